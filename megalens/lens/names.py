"""What a lens' parameters are called on disk: names of our own, which stay when torch, peft or transformers rename their modules.

=================================================  ==================================================================
``verbalizer.prompt``                              ``[L, D]``, the prompt's embeddings
``verbalizer.projection.weight``, ``.bias``        ``[D, D]``, ``[D]``
``verbalizer.adapters.<block>.<path>.A``, ``.B``   ``[r, in]``, ``[out, r]``: LoRA on the layer ``<path>`` of a block
``verbalizer.blocks.<block>.<path>``               a parameter of the role's own copy of a block (mode full)
``verbalizer.norm.<path>``                         a parameter of its own final norm (mode full)
``reconstructor.prompt``, ``.suffix``              ``[L, D]``
``reconstructor.head.weight``, ``.bias``           ``[D, D]``, ``[D]``
``reconstructor.adapters``, ``.blocks``            as the verbalizer's
``reference.<rest>``                               as the verbalizer's: what it was when the training began
=================================================  ==================================================================

``<block>`` counts the subject's decoder blocks from 0, wherever its family keeps them; ``<path>`` is the family's own within a block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_SPEAKER = "(verbalizer|reference)"
_ROLE = "(verbalizer|reconstructor|reference)"
_RULES = tuple(
    (re.compile(pattern), stable)
    for pattern, stable in (
        (rf"{_ROLE}\.(prompt|suffix)\.weight", r"\1.\2"),
        (rf"{_SPEAKER}\.projection\.linear\.(weight|bias)", r"\1.projection.\2"),
        (r"reconstructor\.head\.linear\.(weight|bias)", r"reconstructor.head.\1"),
        (rf"{_SPEAKER}\.own_norm\.(.+)", r"\1.norm.\2"),
        (rf"{_ROLE}\.own\.(\d+)\.(.+)", r"\1.blocks.\2.\3"),
        # The first number in a path is the block's; further ones (experts) are within the block.
        (rf"subject\.lm\.model\.(?:[^.]*[^.\d][^.]*\.)+(\d+)\.(.+)\.lora_([AB])\.{_ROLE}\.weight", r"\4.adapters.\1.\2.\3"),
    )
)
_GROUPS = {
    "verbalizer.prompt": "verbalizer.prompt",
    "verbalizer.projection": "verbalizer.projection",
    "verbalizer.adapters": "verbalizer.adapters",
    "verbalizer.blocks": "verbalizer.blocks",
    "verbalizer.norm": "verbalizer.blocks",
    "reconstructor.prompt": "reconstructor.prompt",
    "reconstructor.suffix": "reconstructor.prompt",
    "reconstructor.head": "reconstructor.head",
    "reconstructor.adapters": "reconstructor.adapters",
    "reconstructor.blocks": "reconstructor.blocks",
}
GROUPS = tuple(dict.fromkeys(_GROUPS.values()))


def stable_name(name: str) -> str:
    """The stable name of a parameter, from its name in ``ConsistencyLens.named_parameters()``.

    Raises:
        ValueError: the lens' own parameters have no such name.
    """
    for pattern, stable in _RULES:
        found = pattern.fullmatch(name)
        if found:
            return found.expand(stable).replace(".base_layer.", ".")  # peft's name for a layer that carries adapters
    raise ValueError(f"{name} is no parameter of a lens")


def stable_names(names: Iterable[str]) -> dict[str, str]:
    """The stable name of each of a lens' parameters, by its name in the module.

    Raises:
        ValueError: one is no parameter of a lens, or two would be called the same.
    """
    stable = {name: stable_name(name) for name in names}
    twice = [name for name, count in Counter(stable.values()).items() if count > 1]
    if twice:
        raise ValueError(f"two parameters of a lens have one name: {twice[0]}")
    return stable


def module_names(names: Iterable[str]) -> dict[str, str]:
    """The way back: the name in the module of each of a lens' parameters, by its stable name.

    Args:
        names: those in the module; they tell where the subject's family keeps its blocks.

    Raises:
        ValueError: one is no parameter of a lens, or two would be called the same.
    """
    return {stable: name for name, stable in stable_names(names).items()}


def group_of(stable: str) -> str:
    """The group a parameter belongs to, one of :data:`GROUPS`: the norm is of the blocks, the suffix of the prompt.

    Raises:
        ValueError: it is no stable name.
    """
    part = ".".join(stable.split(".", 2)[:2])
    if part not in _GROUPS:
        raise ValueError(f"{stable} is no parameter of a lens")
    return _GROUPS[part]
