"""Which implementations of a vocabulary op there are on a machine, and which of them is the fastest."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from megalens.ops.checks import OpError
from megalens.ops.tile import tiles_pay

IMPLEMENTATIONS = ("reference", "tile", "triton")


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def fastest(weight_VD: Tensor) -> str:
    """The fastest implementation for an output embedding, by its device and size."""
    if weight_VD.is_meta:  # shapes alone: as on a GPU
        return "triton"
    if weight_VD.is_cuda and weight_VD.dtype != torch.float64 and has_triton():
        return "triton"
    return "tile" if tiles_pay(weight_VD) else "reference"


def triton_version(op: str, weight_VD: Tensor, module: str) -> ModuleType:
    """The module with an op's Triton version.

    Raises:
        OpError: Triton is not installed, or cannot serve these weights.
    """
    if not has_triton():
        raise OpError(f'{op}: impl="triton" needs triton: pip install triton, or use "auto"')
    if weight_VD.dtype == torch.float64:
        raise OpError(f'{op}: impl="triton" has no float64: use impl="reference"')
    return import_module(f"megalens.ops.{module}")
