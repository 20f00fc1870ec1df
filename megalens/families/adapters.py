"""LoRA adapters of several roles on one shared, frozen base: put there once, switched on for the time of a call."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megalens.config import ConfigError, Lora
from megalens.families.causal_lm import CausalLM
from megalens.families.stacked import StackedAdapters, add_to_stacks, stacks_of


def add_adapter(lm: CausalLM, name: str, blocks: range, lora: Lora, seed: int) -> dict[str, nn.Parameter]:
    """Put LoRA adapters called ``name`` on the linear layers and stacks of experts of ``blocks`` that ``lora`` names.

    They work only inside :func:`adapter`.

    Where a layer has no weights yet (it is on the meta device), neither have its adapters: they start as :func:`adapter_start` says.

    Returns the new, trainable parameters by their name within ``lm``; the trainability of all others stays as it was.

    Raises:
        ConfigError: a target is no linear layer there.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    chosen = [lm.blocks[i] for i in blocks]
    named = [(f"{i}.{path}", layer) for i in blocks for path, layer in lm.blocks[i].named_modules() if ".lora_" not in path]
    linear = [path for path, layer in named if isinstance(layer, (nn.Linear, Conv1D)) and _is_called(lm, path, layer)]
    linear = sorted({path.removesuffix(".base_layer") for path in linear})
    stacks = sorted({f"{path.removesuffix('.base_layer')}.{name}" for path, layer in named for name in stacks_of(layer)})
    targets = set(_targets(linear + stacks, lora.targets))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int and takes any number
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=[path for path in linear if path in targets],
    )
    trainable = {n for n, p in lm.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():  # peft warns of a second adapter, and of GPT-2's transposed layers: both are meant
        warnings.simplefilter("ignore", UserWarning)
        if config.target_modules:
            inject_adapter_in_model(config, lm.blocks, adapter_name=name)  # the blocks alone: of a whole model peft changes the targets
    for i, block in zip(blocks, chosen, strict=True):
        add_to_stacks(block, name, lora, {path.partition(".")[2] for path in stacks if path in targets and path.startswith(f"{i}.")})
    added = {n: p for n, p in lm.named_parameters() if ".lora_" in n and f".{name}." in n}
    for n, p in lm.named_parameters():
        p.requires_grad_(n in added or n in trainable)
        if n in added:
            p.data = (p if p.is_meta else adapter_start(seed, n, p.shape)).to(p.device, lm.dtype)
    lm.adapted = [module for module in lm.model.modules() if _is_adapted(module)]
    for layer in lm.adapted:
        layer._active_adapter = []
    return added


def _targets(layers: list[str], wanted: list[str]) -> list[str]:
    """Those of some layers whose paths end in one of the wanted names; all where none is named."""
    for name in wanted:
        if not any(f".{path}".endswith(f".{name}") for path in layers):
            there = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
            raise ConfigError(f"lora.targets: no linear layer of the adapted blocks is called {name}; there are {there}")
    return [path for path in layers if not wanted or any(f".{path}".endswith(f".{name}") for name in wanted)]


def _is_called(lm: CausalLM, path: str, layer: nn.Module) -> bool:
    """Whether LoRA on a linear layer would do anything: not on a router, which gives more than its product, nor where a make says so."""
    return not type(layer).__name__.endswith("Router") and not set(path.split(".")) & set(lm.family.uncalled)


def without_adapters(module: nn.Module) -> nn.Module:
    """The module with each layer that carries adapters replaced by the layer alone."""
    for path, part in list(module.named_modules()):
        if _is_adapted(part):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, part.base_layer)
    return module


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer | StackedAdapters)


def adapter_start(seed: int, name: str, shape: torch.Size) -> Tensor:
    """What a LoRA matrix starts as: a function of the seed and its name, whoever makes it and in whatever order.

    B starts at zero, so that an adapter changes nothing at first; A is uniform within ``1 / sqrt(inputs)``, as peft draws it.
    """
    if ".lora_A." not in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.empty(shape).uniform_(-1.0, 1.0, generator=draw) / shape[-1] ** 0.5


@contextmanager
def adapter(lm: CausalLM, name: str | None) -> Iterator[None]:
    """Run the shared base with the adapters called ``name``; without any when None.

    peft's own ``set_adapter`` also flips ``requires_grad``, which must not happen between the roles of one step.
    """
    before = [layer._active_adapter for layer in lm.adapted]
    for layer in lm.adapted:
        layer._active_adapter = [name] if name else []
    try:
        yield
    finally:
        for layer, active in zip(lm.adapted, before, strict=True):
            layer._active_adapter = active
