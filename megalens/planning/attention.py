"""A stand-in for fused attention on the meta device, where PyTorch has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@torch.library.custom_op("megalens::planned_attention", mutates_args=())
def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a fused attention leaves behind: its result and a log-sum-exp per query and head. Shapes only."""
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("megalens::planned_attention_backward", mutates_args=())
def _attention_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients that it leaves behind. Shapes only."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_attention.register_fake(_attention._init_fn)
_attention_backward.register_fake(_attention_backward._init_fn)
_attention.register_autograd(
    lambda ctx, *_: _attention_backward(*ctx.saved_tensors[:3]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


@contextmanager
def fused_attention() -> Iterator[None]:
    """While entered, ``scaled_dot_product_attention`` allocates what the kernels of GPUs and CPUs do.

    Without it, PyTorch computes attention step by step on the meta device, with a tensor of scores that no kernel keeps.
    """
    spelt_out = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _attention(query, key, value)[0]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = spelt_out
