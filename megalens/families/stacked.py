"""LoRA on matrices that lie in one parameter, as a mixture's experts do: each matrix of the stack has its own."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megalens.config import ConfigError, Lora


class Factor(nn.Module):
    """One of the two matrices of LoRA, for each of a stack: ``[E, r, columns]`` or ``[E, rows, r]``."""

    def __init__(self, stack: int, rows: int, columns: int, like: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(stack, rows, columns, dtype=like.dtype, device=like.device))


class Factors(nn.Module):
    """The adapters of one stack, by name; called as a function of the stack ``[E, rows, columns]``, it adds one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    def add(self, name: str, stack: Tensor, r: int) -> None:
        """An adapter of rank ``r``."""
        count, rows, columns = stack.shape
        self.lora_A[name], self.lora_B[name] = Factor(count, r, columns, stack), Factor(count, rows, r, stack)

    def forward(self, stack: Tensor, name: str, scale: float) -> Tensor:
        """``stack + scale * B @ A``."""
        return torch.baddbmm(stack, cast(Tensor, self.lora_B[name].weight), cast(Tensor, self.lora_A[name].weight), alpha=scale)


class StackedAdapters(nn.Module):
    """A layer whose stacks of matrices carry adapters, switched as peft's layers are.

    There is no dropout: its input cannot be told from the outside.

    Args:
        layer: the layer; its parameters of three dimensions are the stacks.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer
        self.scales: dict[str, float] = {}
        self.targets: dict[str, list[str]] = {}
        self.lora_dropout = nn.ModuleDict()
        self._active_adapter: list[str] = []
        for name in stacks_of(layer):
            self.add_module(name, Factors())

    def add(self, adapter: str, lora: Lora, targets: list[str]) -> None:
        """Adapters of some of the stacks."""
        self.scales[adapter] = lora.alpha / (lora.r**0.5 if lora.rslora else lora.r)
        self.targets[adapter] = targets
        for name in targets:
            cast(Factors, self.get_submodule(name)).add(adapter, getattr(self.base_layer, name), lora.r)

    def forward(self, *args, **options):
        """The layer with its adapters added."""
        active = [name for name in self._active_adapter if name in self.scales]
        if not active:
            return self.base_layer(*args, **options)
        changed: dict[str, Tensor] = {}
        for adapter in active:
            for name in self.targets[adapter]:
                stack = changed.get(name, getattr(self.base_layer, name))
                if not stack.numel():
                    raise ConfigError("ZeRO-3 keeps stacked experts from their adapters; set engine=fsdp, or name other lora.targets")
                changed[name] = self.get_submodule(name)(stack, adapter, self.scales[adapter])
        return functional_call(self.base_layer, changed, args, options)


def add_to_stacks(block: nn.Module, adapter: str, lora: Lora, targets: set[str]) -> None:
    """Put adapters on some stacks of matrices of a block, named by their paths in it."""
    layers = {path: (path.removesuffix("base_layer").removesuffix("."), layer) for path, layer in block.named_modules()}
    for place, layer in layers.values():
        chosen = [name for name in stacks_of(layer) if f"{place}.{name}" in targets]
        if not chosen:
            continue
        carrier = block.get_submodule(place)
        if not isinstance(carrier, StackedAdapters):
            parent, _, name = place.rpartition(".")
            carrier = StackedAdapters(layer)
            setattr(block.get_submodule(parent), name, carrier)
        carrier.add(adapter, lora, chosen)


def stacks_of(layer: nn.Module) -> list[str]:
    """Names of a layer's own parameters that are stacks of matrices: ``[E, rows, columns]``; a convolution's are not."""
    if isinstance(layer, nn.Conv1d | Factor):
        return []
    return [name for name, parameter in layer.named_parameters(recurse=False) if parameter.dim() == 3 and min(parameter.shape[1:]) > 1]
