"""The token ids that stand around an explanation, and whether the subject can read them and all that is asked of it.

A position behind a model's window is an error where positions are learned (GPT-2) and a silent loss of quality where they are rotary;
both are refused, since a lens would be trained, or measured, on activations that mean nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megalens.config import Config, ConfigError
from megalens.families.protocol import Settings


class Prompts(NamedTuple):
    """Token ids of the verbalizer's prompt before and behind its slot, of its plain prompt, of the reconstructor's two, and of the
    marker that stands in the slot, where there is one."""

    left: list[int]
    right: list[int]
    plain: list[int]
    before: list[int]
    suffix: list[int]
    marker: list[int]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, key: str) -> list[int]:
    """Token ids of a prompt, at least one: an empty prompt is the tokenizer's end of text.

    Raises:
        ConfigError: it is empty and the tokenizer has no such token.
    """
    ids = tokenizer(text)["input_ids"]
    if ids:
        return ids
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError(f"{key} is empty, and the tokenizer has no end-of-text token to stand there; write a prompt")
    return [tokenizer.eos_token_id]


def prompts_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """All prompts of a configuration.

    Raises:
        ConfigError: as of :func:`prompt_ids`.
    """
    options, chat = config.verbalizer, config.verbalizer.chat
    left, right, marker = _around_slot(config, tokenizer)
    plain = options.plain_prompt if not chat else chat_prompt(tokenizer, options.plain_prompt)
    return Prompts(
        left,
        right,
        tokenizer(plain, add_special_tokens=False)["input_ids"] if chat else prompt_ids(tokenizer, plain, "verbalizer.plain_prompt"),
        prompt_ids(tokenizer, config.reconstructor.prompt, "reconstructor.prompt"),
        tokenizer(config.reconstructor.suffix, add_special_tokens=False)["input_ids"],
        marker,
    )


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as the one message of a user in the tokenizer's chat template, up to where the assistant begins.

    It is to be tokenised without special tokens: the template has written them.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"verbalizer.chat=true needs a tokenizer with a chat template: {str(error).splitlines()[0]}") from None


def _around_slot(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Token ids before the slot and behind it, and the marker's.

    Without a marker both sides are tokenised alone. With one the prompt is tokenised whole, the marker in the slot, as readers do that
    look for the marker among the ids.
    """
    options = config.verbalizer
    text = chat_prompt(tokenizer, options.prompt) if options.chat else options.prompt
    if text.count("<act>") != 1:
        raise ConfigError("verbalizer.chat=true: the chat template does not print the prompt's slot <act> exactly once")
    left, right = text.split("<act>")
    if options.marker is None:
        ids = tokenizer(left, add_special_tokens=not options.chat)["input_ids"]
        return ids, tokenizer(right, add_special_tokens=False)["input_ids"], []
    marker = tokenizer(options.marker, add_special_tokens=False)["input_ids"]
    ids = tokenizer(left + options.marker + right, add_special_tokens=not options.chat)["input_ids"]
    if len(marker) != 1 or ids.count(marker[0]) != 1:
        found = f"{len(marker)} tokens" if len(marker) != 1 else f"{ids.count(marker[0])} times in the prompt's ids"
        raise ConfigError(f"verbalizer.marker={options.marker!r} must be one token that stands in the prompt once; it is {found}")
    slot = ids.index(marker[0])
    return ids[:slot], ids[slot + 1 :], marker


def end_id_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a text, as ``verbalizer.end_token`` says; None: texts have a fixed length.

    Raises:
        ConfigError: it is no single token, or the tokenizer has no end-of-text token.
    """
    end = config.verbalizer.end_token
    if end is None:
        return None
    if end == "eos":
        if not isinstance(tokenizer.eos_token_id, int):
            raise ConfigError(
                "verbalizer.end_token=eos, and the tokenizer has no end-of-text token; name a token, e.g. verbalizer.end_token='.'"
            )
        return tokenizer.eos_token_id
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ConfigError(f"verbalizer.end_token={end!r} must be eos or one token of the tokenizer, and it is {len(ids)}")
    return ids[0]


def check_fits(config: Config, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a configuration of which the subject cannot read a context, a prompt with its text, or a token.

    Args:
        settings: the subject's own configuration.

    Raises:
        ConfigError: one is longer than the subject's window, or an id has no row in its embedding.
    """
    prompts = prompts_of(config, tokenizer)
    _check_ids(config, settings, tokenizer, prompts)
    check_context(config, settings)
    before = max(len(prompts.left) + 1 + len(prompts.right), len(prompts.plain), len(prompts.before) + len(prompts.suffix))
    what = f"t_text={config.t_text} with the longest prompt before it ({before} tokens)"
    _check_window(config, settings, before + config.t_text, what, "lower t_text or shorten the prompts")


def check_context(config: Config, settings: Settings) -> None:
    """Refuse contexts that the subject cannot read.

    Raises:
        ConfigError: they are longer than its window.
    """
    length = config.activation_dumper.seq_len
    _check_window(config, settings, length, f"activation_dumper.seq_len={length}", "lower it")


def check_tokenizer(config: Config, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that gives ids without a row in the subject's embedding.

    Special tokens count only where a text can hold them: their names in a text are read as plain text.

    Raises:
        ConfigError: it does.
    """
    _check_ids(config, settings, tokenizer, None)


def window_of(settings: Settings) -> int | None:
    """Positions that a model was made for; None: its configuration names no end."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def _check_ids(config: Config, settings: Settings, tokenizer: PreTrainedTokenizerBase, prompts: Prompts | None) -> None:
    rows = settings.get_text_config().vocab_size
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    largest = max((number for number in tokenizer.get_vocab().values() if number not in special), default=0)
    largest = max([largest, *tokenizer("a")["input_ids"], *(number for ids in prompts or () for number in ids)])
    if largest >= rows:
        name = config.tokenizer_name or config.model_name
        mend = "set tokenizer_name to the tokenizer it was trained with" if config.tokenizer_name else "fetch the model anew"
        raise ConfigError(f"the tokenizer of {name} gives ids up to {largest}, and {config.model_name} has {rows} embeddings; {mend}")


def _check_window(config: Config, settings: Settings, length: int, what: str, mend: str) -> None:
    window = window_of(settings)
    if window is not None and length > window:
        raise ConfigError(f"{what} is more than the window of {config.model_name}, {window} positions; {mend}")
