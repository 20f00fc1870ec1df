"""What is checked before any compute, and the error that says it in one line."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class OpError(ValueError):
    """An argument of a vocabulary op is wrong. The message is one line and names the argument."""


def check_head(op: str, side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """A head is hidden states ``[N, D]``, an output embedding ``[V, D]`` and perhaps a bias ``[V]``, of one dtype and one device."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise OpError(f"{op}: {side}hidden {list(hidden.shape)} and {side}weight {list(weight.shape)} must be [N, D] and [V, D] with one D")
    if hidden.shape[0] == 0:
        raise OpError(f"{op}: {side}hidden has no row: the batch is empty")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise OpError(f"{op}: {side}weight {list(weight.shape)} is empty: no vocabulary to choose from")
    if weight.shape[0] >= 2**31:
        raise OpError(f"{op}: a vocabulary of {weight.shape[0]} ids is beyond 32-bit ids")
    if hidden.dtype != weight.dtype or hidden.dtype not in FLOATS:
        raise OpError(f"{op}: {side}hidden is {hidden.dtype} and {side}weight {weight.dtype}: give both one floating dtype")
    check_device(op, **{f"{side}hidden": hidden, f"{side}weight": weight, f"{side}bias": bias})
    if bias is not None and bias.shape != weight.shape[:1]:
        raise OpError(f"{op}: {side}bias {list(bias.shape)} must be [{weight.shape[0]}], one per vocabulary id")


def check_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors lie on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise OpError(
            f"{op}: all tensors must lie on one device, but " + ", ".join(f"{name} is on {device}" for name, device in devices.items())
        )


def check_ids(op: str, ids_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> None:
    """Token ids are int64, one per row. That they are in the vocabulary is checked where no GPU must be waited for: on a CPU."""
    if ids_N.dtype != torch.int64 or ids_N.shape != hidden_ND.shape[:1]:
        raise OpError(f"{op}: ids must be int64 [{hidden_ND.shape[0]}], one per row, not {ids_N.dtype} {list(ids_N.shape)}")
    check_device(op, hidden=hidden_ND, ids=ids_N)
    if ids_N.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (bound.item() for bound in ids_N.aminmax())
        if low < 0 or high >= weight_VD.shape[0]:
            raise OpError(f"{op}: ids {low} to {high} are not all in the vocabulary, 0 to {weight_VD.shape[0] - 1}")


def check_softcap(op: str, softcap: float | None) -> None:
    """A soft-cap is absent or a positive number."""
    if softcap is not None and not softcap > 0:
        raise OpError(f"{op}: softcap must be above 0 (or None), not {softcap}")


def check_impl(op: str, impl: str, known: tuple[str, ...]) -> None:
    """The implementation is one that exists."""
    if impl not in ("auto", *known):
        raise OpError(f"{op}: impl '{impl}' is none of auto, {', '.join(known)}")


def cast_under_autocast(hidden: Tensor, weight: Tensor) -> Tensor:
    """Cast hidden states, which under autocast arrive in its dtype, to the weight's: a vocabulary op computes in that."""
    return hidden.to(weight.dtype) if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type) else hidden


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context without autocast on the tensor's device. The meta device has no autocast."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
