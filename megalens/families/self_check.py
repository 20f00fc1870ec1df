"""A model that is walked is a model that was checked: a few tokens through the walk give what its own forward gives, or it is refused."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megalens.cli import is_out_of_memory
from megalens.config import ConfigError
from megalens.families.cache import KVCache
from megalens.families.causal_lm import CausalLM
from megalens.families.prefix import read_prefix
from megalens.families.protocol import KINDS, Settings
from megalens.families.tiny_copy import tiny_copy

_TOKENS, _WINDOW = 8, 3
_CUT, _LAST = 5, (6, 2)  # a text is read up to the cut, then on; two rows are patched, one of them long before its end
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-6}
_REORDERED = 5  # how much more another order of summation may change than the same one does
_NOT_CALLABLE_SO = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # what foreign code raises at a wrong call


def check_walk(lm: CausalLM, device: torch.device | None = None) -> None:
    """Hold the walk against the model's own forward on a few tokens.

    Compared are the stream before each block and before the final norm, the logits, the same when the text is read in two parts, and the
    logits at two positions where the output of block 0 is replaced. Sliding windows are made shorter than the text for the time of the
    check. The blocks may be only the first few of the model's. It costs about eight forward passes of 8 tokens, in the model's dtype and
    under its engine: ranks that share a sharded model check together.

    Args:
        device: where the model computes; None: where its embedding is.

    Raises:
        ConfigError: they differ by more than the dtype's rounding, or the model cannot be walked at all.
    """
    try:
        with torch.no_grad(), _short_window(lm.config):
            difference = _first_difference(lm, device or lm.vocabulary.in_weight.device)
    except ConfigError:
        raise
    except _NOT_CALLABLE_SO as error:
        if is_out_of_memory(error) or isinstance(error, torch.distributed.DistError):
            raise  # the machine's doing, not the model's
        reason = (str(error).strip().splitlines() or [""])[0]
        difference = f"it cannot be called block by block ({type(error).__name__}: {reason})"
    if difference:
        raise ConfigError(
            f"models of type '{lm.config.model_type}' cannot be studied: {difference}; choose another model, or register its make "
            "(docs/extending.md)"
        )


def check_layout(settings: Settings, trust_remote_code: bool = False) -> None:
    """:func:`check_walk` on a tiny random model of the same configuration, before the weights of a large one are read.

    That proves what the code does for these settings: names, order, multipliers, soft-caps, masks, caches. It does not prove what depends
    on the sizes that were made smaller, or on the weights.

    Raises:
        ConfigError: the walk differs from the tiny model's forward, or no tiny model can be made.
    """
    try:
        model = tiny_copy(settings, trust_remote_code)
    except _NOT_CALLABLE_SO as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"models of type '{settings.model_type}' cannot be checked without loading them whole, since no small one can be made "
            f"({reason}); use an engine that loads whole (local, or ZeRO 1 or 2)"
        ) from None
    check_walk(CausalLM(model))


def _first_difference(lm: CausalLM, device: torch.device) -> str | None:
    """Describe the first place where the walk and the model's own forward differ."""
    ids = _ids(lm).to(device)
    positions = torch.arange(_TOKENS, device=ids.device)[None]
    with _entering([*lm.blocks]) as own_states, _entering([lm.norm]) as normed:
        own_logits = lm.model(ids, use_cache=False).logits
    if not own_logits.isfinite().all():
        raise ConfigError(
            f"a model of type '{lm.config.model_type}' gives logits that are not finite: its weights are damaged, fetch it anew"
        )
    if len(own_states) != len(lm.blocks):
        return f"its forward calls its {len(lm.blocks)} blocks {len(own_states)} times, not once each"
    tolerance = _TOLERANCE[lm.dtype]
    rows = lm.vocabulary(lambda _, into, __: into[ids] * lm.embed_scale)
    if not (error := _relative(lm.embed(ids), rows)) <= tolerance:
        return f"its embeddings are not rows of its embedding matrix times {float(lm.embed_scale):g} ({error:.1%} off)"
    state = lm.enter(lm.embed(ids), positions)
    for block, own_state in enumerate([*own_states, *normed[-1:]]):  # a norm of our own is never called there
        if not (error := _relative(state, own_state)) <= tolerance:
            return f"its own residual stream before {_name(lm, block)} differs by {error:.1%} from the one computed block by block"
        if block < len(lm.blocks):
            state = lm.run(state, block, block + 1, positions)
    if not (error := _relative(lm.logits(lm.final_norm(state)), own_logits)) <= tolerance:
        return f"its own logits differ by {error:.1%} from those computed from its final norm and vocabulary matrix"
    return _difference_in_parts(lm, ids, state) or _difference_when_patched(lm, ids)


def _difference_in_parts(lm: CausalLM, ids: Tensor, whole: Tensor) -> str | None:
    """Compare the stream after the last block with the one of a text that is read in two parts, the second by two rows."""
    cache, last, positions = KVCache(), len(lm.blocks), torch.arange(_TOKENS, device=ids.device)[None]
    hidden = lm.enter(lm.embed(ids), positions)
    lm.run(hidden[:, :_CUT], 0, last, positions[:, :_CUT], cache=cache)
    kept = cache.stored.keys() | {block for block, *_ in cache.states}
    if lost := [block for block in range(last) if KINDS[lm.kinds[block]] != "nothing" and block not in kept]:
        return f"block {lost[0]} does not keep its keys and values in the cache it is given"
    rest = lm.run(hidden[:, _CUT:].expand(2, -1, -1), 0, last, positions[:, _CUT:], cache=cache)
    if not (error := _relative(rest, whole[:, _CUT:].expand(2, -1, -1))) <= _REORDERED * _TOLERANCE[lm.dtype]:
        return f"read in two parts, its residual stream differs by {error:.1%} from the one read at once"
    return None


def _difference_when_patched(lm: CausalLM, ids: Tensor) -> str | None:
    """Compare logits where block 0's output is replaced: one token on what the blocks above kept, and the model's own forward."""
    each_B, last_B = torch.arange(len(_LAST), device=ids.device), torch.tensor(_LAST, device=ids.device)
    ids_BS = torch.stack([ids[0], ids[0].flip(0)])
    positions = torch.arange(_TOKENS, device=ids.device)[None]
    after_BSD = lm.run(lm.enter(lm.embed(ids_BS), positions), 0, 1, positions)
    new_BD = after_BSD[each_B, last_B].flip(0) * 1.25
    hidden_BD, prefix = read_prefix(lm, after_BSD, 1, last_B, each_B)
    found = lm.logits(lm.final_norm(torch.stack([hidden_BD, prefix.go_on(lm, new_BD)])))
    with _replacing(lm.blocks[0], each_B + len(_LAST), last_B, new_BD):
        own = lm.model(ids_BS.repeat(2, 1), use_cache=False).logits.unflatten(0, (2, -1))[:, each_B, last_B]
    for name, mine, expected in zip(("read", "patched"), found, own, strict=True):
        if not (error := _relative(mine, expected)) <= _REORDERED * _TOLERANCE[lm.dtype]:
            return f"its own logits at a position that is {name} differ by {error:.1%} from those of one token on what its blocks kept"
    return None


@contextmanager
def _replacing(block: nn.Module, row_B: Tensor, position_B: Tensor, value_BD: Tensor):
    """A block whose output is replaced at one position of some rows."""

    def replace(_, __, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[row_B, position_B] = value_BD.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = block.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _name(lm: CausalLM, block: int) -> str:
    return f"block {block}" if block < len(lm.blocks) else "the final norm"


def _ids(lm: CausalLM) -> Tensor:
    """``[1, 8]`` different ids from all over the vocabulary, none of which is the padding's."""
    rows, padding = lm.vocabulary.in_weight.shape[0], getattr(lm.config, "pad_token_id", None)
    chosen = dict.fromkeys(int(i * (rows - 1) / (2 * _TOKENS)) for i in range(1, 2 * _TOKENS))
    ids = [i for i in chosen if i != padding]
    return torch.tensor([(ids * _TOKENS)[:_TOKENS]])


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
