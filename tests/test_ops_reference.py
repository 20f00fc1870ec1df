"""The vocabulary ops' reference: what it computes, its gradients, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from megalens.ops import OpError, gumbel_embed, noise_keys, vocab_kl
from megalens.ops.noise import gumbel


def heads(B=3, V=11, D=5, dtype=torch.float64, seed=0):
    """hidden [B, D], two embeddings [V, D], a bias [V] and keys [B]."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(B, D), (V, D), (V, D), (V,)]
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    return *tensors, noise_keys(seed, 1, torch.arange(B), 0)


def test_reference_is_gumbel_softmax_hard_times_embedding():
    hidden, out_weight, in_weight, bias, keys = heads()
    leaves = [t.clone().requires_grad_() for t in (hidden, out_weight, in_weight)]
    mine = gumbel_embed(*leaves, 0.7, keys, bias_V=bias, impl="reference")
    other = [t.clone().requires_grad_() for t in (hidden, out_weight, in_weight)]
    noisy = other[0] @ other[1].T + bias + gumbel(keys, 11)
    soft = (noisy / 0.7).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 11).double()
    embeds = (hard + soft - soft.detach()) @ other[2]
    assert torch.equal(mine.embeds, in_weight[mine.ids])
    assert torch.equal(mine.ids, soft.argmax(-1))
    grad = torch.randn(3, 5, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(mine.embeds, leaves, grad), torch.autograd.grad(embeds, other, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_scalars_are_those_of_the_plain_softmax():
    hidden, out_weight, in_weight, bias, keys = heads()
    out = gumbel_embed(hidden, out_weight, in_weight, 0.7, keys, bias_V=bias, softcap=2.0)
    categorical = torch.distributions.Categorical(logits=2.0 * torch.tanh((hidden @ out_weight.T + bias) / 2.0))
    torch.testing.assert_close(out.log_prob, categorical.log_prob(out.ids))
    torch.testing.assert_close(out.entropy, categorical.entropy())


def test_zero_noise_is_greedy():
    hidden, out_weight, in_weight, _, keys = heads()
    assert torch.equal(gumbel_embed(hidden, out_weight, in_weight, 0.7, keys, noise=0.0).ids, (hidden @ out_weight.T).argmax(-1))


def test_vocab_kl_is_the_kl_of_torch_distributions():
    hidden, p_weight, q_weight, bias, _ = heads()
    kl = vocab_kl(hidden, -hidden, p_weight, q_weight, p_bias=bias, softcap=3.0)
    p, q = (torch.distributions.Categorical(logits=3.0 * torch.tanh(z / 3.0)) for z in (hidden @ p_weight.T + bias, -hidden @ q_weight.T))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q))


REFUSED = {
    "tau must be above 0": lambda h, w, e, b, k: gumbel_embed(h, w, e, 0.0, k),
    "noise must be 0 or more": lambda h, w, e, b, k: gumbel_embed(h, w, e, 1.0, k, noise=-1.0),
    "softcap must be above 0": lambda h, w, e, b, k: gumbel_embed(h, w, e, 1.0, k, softcap=0.0),
    "with one D": lambda h, w, e, b, k: gumbel_embed(h[:, 1:], w, e, 1.0, k),
    "the batch is empty": lambda h, w, e, b, k: gumbel_embed(h[:0], w, e, 1.0, k[:0]),
    "no vocabulary": lambda h, w, e, b, k: gumbel_embed(h, w[:0], e[:0], 1.0, k),
    "one floating dtype": lambda h, w, e, b, k: gumbel_embed(h.float(), w, e, 1.0, k),
    "out_weight's rows": lambda h, w, e, b, k: gumbel_embed(h, w, e[1:], 1.0, k),
    "one per row": lambda h, w, e, b, k: gumbel_embed(h, w, e, 1.0, k[1:]),
    "one per vocabulary id": lambda h, w, e, b, k: gumbel_embed(h, w, e, 1.0, k, bias_V=b[1:]),
    "one device": lambda h, w, e, b, k: gumbel_embed(h, w.to("meta"), e, 1.0, k),
    "none of auto": lambda h, w, e, b, k: gumbel_embed(h, w, e, 1.0, k, impl="magic"),
    "one row each": lambda h, w, e, b, k: vocab_kl(h, h[1:], w, w),
    "one vocabulary": lambda h, w, e, b, k: vocab_kl(h, h, w, w[1:]),
    "draw must be a number or int64": lambda h, w, e, b, k: noise_keys(0, 0, k, 0, draw=k[1:]),
    "must be int64": lambda h, w, e, b, k: noise_keys(0, 0, k.int(), 0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused_in_one_line(message):
    with pytest.raises(OpError, match=message) as error:
        REFUSED[message](*heads())
    assert "\n" not in str(error.value)


def test_nan_and_infinite_tau_are_handled_as_numbers():
    hidden, out_weight, in_weight, _, keys = heads()
    with pytest.raises(OpError, match="tau must be above 0"):
        gumbel_embed(hidden, out_weight, in_weight, float("nan"), keys)
