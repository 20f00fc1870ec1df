"""A model that is walked is a model that was checked: a few tokens through the walk give what its own forward gives, or it is refused."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn

from megalens.config import ConfigError
from megalens.families.cache import KVCache
from megalens.families.causal_lm import CausalLM
from megalens.families.protocol import Settings
from megalens.families.registry import attention_of

_TOKENS, _WINDOW = 8, 3
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-6}
_NOT_CALLABLE_SO = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # what foreign code raises at a wrong call


def check_walk(lm: CausalLM) -> None:
    """Hold the walk against the model's own forward on a few tokens: the stream before each block and before the final norm, and logits.

    The blocks may be only the first few of the model's. Sliding windows are made shorter than the text for the time of the check.
    It costs two forward passes of 8 tokens. That the blocks fill a cache is checked; that they go on from it rightly is left to tests.

    Raises:
        ConfigError: they differ by more than the dtype's rounding, or the model cannot be walked at all.
    """
    try:
        with torch.no_grad(), _short_window(lm.config):
            difference = _first_difference(lm)
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except _NOT_CALLABLE_SO as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        difference = f"it cannot be called block by block ({type(error).__name__}: {reason})"
    if difference:
        raise ConfigError(
            f"models of type '{lm.config.model_type}' cannot be studied: {difference}; choose another model, or register its make "
            "(docs/extending.md)"
        )


def check_layout(settings: Settings, trust_remote_code: bool = False) -> None:
    """:func:`check_walk` on a tiny random model of the same configuration, for a model whose weights are not there to be used.

    The tiny model is of transformers' own class: as few blocks as have every kind that the configuration lists (two at least), few
    heads, narrow layers, few tokens. That proves what the code does for these settings: names, order, multipliers, soft-caps, masks,
    caches. It does not prove what depends on the sizes that were made smaller, or on the weights.

    Raises:
        ConfigError: the walk differs from the tiny model's forward, or no tiny model can be made.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"dtype": torch.float32, "attn_implementation": attention_of(settings), "trust_remote_code": trust_remote_code}
            model = transformers.AutoModelForCausalLM.from_config(_tiny(settings), **options).eval()
            _draw_weights(model)
    except _NOT_CALLABLE_SO as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"models of type '{settings.model_type}' cannot be checked without loading them whole, since no small one can be made "
            f"({reason}); use an engine that loads whole (local, or ZeRO 1 or 2)"
        ) from None
    check_walk(CausalLM(model))


def _first_difference(lm: CausalLM) -> str | None:
    """Describe the first place where the walk and the model's own forward differ."""
    ids = _ids(lm)
    positions = torch.arange(_TOKENS, device=ids.device)[None]
    with _entering([*lm.blocks, lm.norm]) as own_states:
        own_logits = lm.model(ids, use_cache=False).logits
    if not own_logits.isfinite().all():
        raise ConfigError(
            f"a model of type '{lm.config.model_type}' gives logits that are not finite: its weights are damaged, fetch it anew"
        )
    if len(own_states) != len(lm.blocks) + 1:
        return f"its forward calls blocks and final norm {len(own_states)} times, not once each ({len(lm.blocks) + 1})"
    tolerance = _TOLERANCE[lm.dtype]
    rows = lm.vocabulary(lambda _, into, __: into[ids] * lm.embed_scale)
    if (error := _relative(lm.embed(ids), rows)) > tolerance:
        return f"its embeddings are not rows of its embedding matrix times {float(lm.embed_scale):g} ({error:.1%} off)"
    cache, state = KVCache(), lm.enter(lm.embed(ids), positions)
    for block, own_state in enumerate(own_states):
        if not (error := _relative(state, own_state)) <= tolerance:
            return f"its own residual stream before {_name(lm, block)} differs by {error:.1%} from the one computed block by block"
        if block < len(lm.blocks):
            state = lm.run(state, block, block + 1, positions, cache=cache)
            if cache.length(block) != _TOKENS:
                return f"block {block} does not keep its keys and values in the cache it is given"
    if not (error := _relative(lm.logits(lm.final_norm(state)), own_logits)) <= tolerance:
        return f"its own logits differ by {error:.1%} from those computed from its final norm and vocabulary matrix"
    return None


def _name(lm: CausalLM, block: int) -> str:
    return f"block {block}" if block < len(lm.blocks) else "the final norm"


def _ids(lm: CausalLM) -> Tensor:
    """``[1, 8]`` different ids from all over the vocabulary, none of which is the padding's."""
    rows, padding = lm.vocabulary.in_weight.shape[0], getattr(lm.config, "pad_token_id", None)
    chosen = dict.fromkeys(int(i * (rows - 1) / (2 * _TOKENS)) for i in range(1, 2 * _TOKENS))
    ids = [i for i in chosen if i != padding]
    return torch.tensor([(ids * _TOKENS)[:_TOKENS]], device=lm.vocabulary.in_weight.device)


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest error of a position, relative to what is expected there; NaN where either is not finite."""
    found, expected = found.double(), expected.double()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return error.max().item()


@contextmanager
def _entering(modules: list[nn.Module]):
    """The list of the first argument of each call of any of the modules, in the order of the calls."""
    found: list[Tensor] = []

    def note(_, args: tuple, named: dict) -> None:
        found.append((args[0] if args else named["hidden_states"]).clone())  # a model may go on in the same memory

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _short_window(config):
    """Where the attention slides over a window, make it one that the check's tokens do not fit into."""
    window = getattr(config, "sliding_window", None)
    if not window:
        yield
        return
    config.sliding_window = min(window, _WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


# ------------------------------------------------------------------------------------------------------ a tiny model


def _tiny(settings):
    """The configuration of a model of the same kind that is made in a moment."""
    config = copy.deepcopy(settings)
    text = config.get_text_config()
    _shorten(text)
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads  # rotary settings depend on it: it stays
    few_groups = min(groups, 2)
    few_heads = min(heads // groups, 2) * few_groups
    sizes = {
        "num_attention_heads": few_heads,
        "num_key_value_heads": few_groups,
        "hidden_size": few_heads * head_dim,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "n_inner": 64,
        "vocab_size": 64,
    }
    for name, size in sizes.items():
        if getattr(text, name, None):
            setattr(text, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(token := getattr(text, name, None), int):
            setattr(text, name, min(token, text.vocab_size - 1))
    return config


def _shorten(config) -> None:
    """Keep the first blocks, as many as it takes to have every mixture of the settings that are listed block by block."""
    blocks = config.num_hidden_layers
    listed = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == blocks}
    mixtures = [repr([value[i] for value in listed.values()]) for i in range(blocks)]
    few = min(blocks, max(2, 1 + max(mixtures.index(mixture) for mixture in mixtures)))
    config.num_hidden_layers = few
    for name, value in listed.items():
        setattr(config, name, value[:few])


def _draw_weights(model: nn.Module) -> None:
    """Weights that keep every layer's outputs near 1, and norms and biases off their uniform start, so that what is left out shows."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
