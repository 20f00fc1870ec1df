"""FLOPs of the operators that PyTorch's counter does not know: ``FLOPS`` is the ``custom_mapping`` of a ``FlopCounterMode``.

Each formula takes the operator's arguments, with a shape in the place of each tensor. What is no matrix product does not count.
"""

from __future__ import annotations

import math

import torch

import megalens.ops
import megalens.planning.attention  # noqa: F401


def _head(hidden, weight) -> int:
    """A product of hidden states ``[N, D]`` with a vocabulary ``[V, D]``."""
    return 2 * hidden[0] * weight[0] * weight[1]


def _draw(hidden, out_weight, *_, **__) -> int:
    return _head(hidden, out_weight)


def _draw_backward(grads, inputs, bias, saved, tau_and_noise, softcap, weights, *_, **__) -> int:
    """The logits again, the embedding's product with the gradient, and both of these back to the hidden states.

    A gradient of the weights makes the first two twice, and takes one product to the hidden states and one to the weights.
    """
    hidden, out_weight, in_weight, _ = inputs
    again = _head(hidden, out_weight) + _head(hidden, in_weight)
    return (2 * again if weights else again) + 2 * _head(hidden, out_weight)


def _divergences(p_hidden, q_hidden, p_weight, q_weight, *_, **__) -> int:
    return _head(p_hidden, p_weight) + _head(q_hidden, q_weight)


def _divergences_backward(grads, found, hidden_and_weights, p_bias, q_bias, softcap, wanted, **__) -> int:
    """Both sides' logits again, and a product for each gradient of a hidden state or a weight."""
    p_hidden, q_hidden, p_weight, q_weight = hidden_and_weights
    sides = _head(p_hidden, p_weight), _head(q_hidden, q_weight)
    return sum(sides) + sum(product for product, want in zip(sides * 2, wanted[:4], strict=True) if want)


def _log_prob(hidden, weight, *_, **__) -> int:
    return _head(hidden, weight)


def _log_prob_backward(grads, hidden, weight, ids, bias, found, softcap, wanted, *_, **__) -> int:
    """The logits again, and a product for each gradient of a hidden state or the weight."""
    return (1 + sum(wanted[:2])) * _head(hidden, weight)


def _attention(query, key, value, *_, **__) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(query, key, value, *_, **__) -> int:
    """The scores again, and two products for each of forward's."""
    return 5 * _attention(query, key, value) // 2


FLOPS = {
    torch.ops.megalens.planned_attention: _attention,
    torch.ops.megalens.planned_attention_backward: _attention_backward,
    torch.ops.megalens.gumbel_embed: _draw,
    torch.ops.megalens.gumbel_embed_backward: _draw_backward,
    torch.ops.megalens.vocab_log_prob: _log_prob,
    torch.ops.megalens.vocab_log_prob_backward: _log_prob_backward,
    torch.ops.megalens.vocab_divergences: _divergences,
    torch.ops.megalens.vocab_divergences_backward: _divergences_backward,
}
