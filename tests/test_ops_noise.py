"""The noise: a pure function of its six coordinates, uniform, independent along each of them, and a fair draw of tokens.

The statistics are deterministic (no generator is involved), so their bounds can be tight without ever failing by chance.
"""

import math

import pytest
import torch

from megalens.ops import gumbel_embed, native, noise_keys
from megalens.ops.noise import gumbel, split_keys, uniform

SEED, UPDATE, TOKEN = 7, 1234, 3


def draw(keys, num_ids):
    """Uniforms ``[B, V]``."""
    return uniform(split_keys(keys), torch.arange(num_ids, dtype=torch.int32)[:, None]).T


def chi2_sigma(counts, expected):
    """How many standard deviations the chi-squared statistic lies from its mean (Wilson and Hilferty's cube-root normal)."""
    degrees = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def test_keys_are_known_numbers_that_no_machine_may_change():
    keys = noise_keys(1, 2, torch.arange(3), 3)
    assert keys.tolist() == [-7740874834980024244, 5566224767488984011, -9140573146404918304]
    assert (draw(keys, 2)[:2].double() * 2**31).tolist() == [[1854288896, 12174070], [1833907072, 414366624]]


def test_keys_of_draws_are_known_numbers_and_draw_0_is_the_noise_of_a_single_decode():
    ids = torch.arange(3)
    assert torch.equal(noise_keys(1, 2, ids, 3, draw=0), noise_keys(1, 2, ids, 3))
    assert noise_keys(1, 2, ids, 3, draw=1).tolist() == [-6139330534400077149, 5972022929304420723, -4817707998692192735]
    assert noise_keys(1, 2, ids, 3, draw=torch.tensor([0, 1, 2])).tolist() == [
        -7740874834980024244,
        5972022929304420723,
        5891834277007352636,
    ]


def test_no_two_of_many_samples_draws_and_tokens_share_a_key():
    ids = torch.arange(2000).repeat(16)
    draws = torch.arange(16).repeat_interleave(2000)
    keys = torch.cat([noise_keys(SEED, update, ids, token, draws) for update in (0, 1) for token in range(8)])
    assert keys.unique().numel() == keys.numel() == 2 * 8 * 16 * 2000
    assert torch.equal(noise_keys(SEED, 1, ids, 7, draws)[:2000], noise_keys(SEED, 1, ids[:2000], 7))


@pytest.mark.parametrize("draw", [1, 2, 1000])
def test_noise_of_any_draw_is_gumbel(draw):
    assert_gumbel(gumbel(noise_keys(SEED, UPDATE, torch.arange(400), TOKEN, draw), 5000).double())


def test_draws_of_one_sample_are_fair_samples_of_the_softmax():
    weight, keys = (
        torch.randn(12, 4, generator=torch.Generator().manual_seed(0)),
        noise_keys(SEED, 0, torch.zeros(100_000).long(), 0, torch.arange(100_000)),
    )
    hidden = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    out = gumbel_embed(hidden.expand(len(keys), 4).contiguous(), weight, weight, 1.0, keys, impl="reference")
    expected = (hidden @ weight.T).double().softmax(-1)[0] * len(keys)
    assert abs(chi2_sigma(torch.bincount(out.ids, minlength=12).double(), expected)) < 3.5


def test_each_coordinate_changes_the_key():
    ids = torch.arange(1000)
    keys = torch.cat([noise_keys(seed, update, ids, token) for seed in (0, 1) for update in (0, 1, 2) for token in (0, 1, 2)])
    assert keys.unique().numel() == keys.numel()
    assert torch.equal(noise_keys(0, 1, ids, 2)[[5, 2]], noise_keys(0, 1, torch.tensor([5, 2]), 2))


def test_uniform_is_uniform_and_open():
    w = draw(noise_keys(SEED, UPDATE, torch.arange(400), TOKEN), 5000)
    assert w.min() > 0 and w.max() < 1
    counts = torch.histc(w.double(), bins=4096, min=0, max=1)
    assert abs(chi2_sigma(counts, w.numel() / 4096)) < 3.5
    low = torch.histc(w.double(), bins=1000, min=0, max=1e-2)  # the upper tail of the Gumbel noise
    assert abs(chi2_sigma(low, w.numel() * 1e-5)) < 3.5


def test_gumbel_noise_has_its_moments_and_no_infinity():
    assert_gumbel(gumbel(noise_keys(SEED, UPDATE, torch.arange(400), TOKEN), 5000).double())


def assert_gumbel(g):
    """Mean, variance and distribution function are those of the standard Gumbel distribution."""
    assert g.isfinite().all()
    assert abs(g.mean() - 0.5772156649) < 4 * math.sqrt(math.pi**2 / 6 / g.numel())
    assert abs(g.var() - math.pi**2 / 6) < 4 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / g.numel())
    cdf = torch.exp(-torch.exp(-g.flatten().sort().values))  # Kolmogorov-Smirnov
    assert (cdf - (torch.arange(g.numel()) + 0.5) / g.numel()).abs().max() * math.sqrt(g.numel()) < 1.7


ALONG = {
    "seed": lambda i: noise_keys(i, UPDATE, torch.arange(1), TOKEN),
    "optimizer step": lambda i: noise_keys(SEED, i, torch.arange(1), TOKEN),
    "sample": lambda i: noise_keys(SEED, UPDATE, torch.tensor([i]), TOKEN),
    "draw": lambda i: noise_keys(SEED, UPDATE, torch.arange(1), TOKEN, i),
    "token": lambda i: noise_keys(SEED, UPDATE, torch.arange(1), i),
}


@pytest.mark.parametrize("coordinate", [*ALONG, "vocabulary id"])
def test_neighbours_along_each_coordinate_are_independent(coordinate):
    """Pairs at distances 1, 2, 4, ... fall evenly into 16 x 16 squares, and so do bits of their exclusive or."""
    if coordinate == "vocabulary id":
        w = draw(noise_keys(SEED, UPDATE, torch.arange(64), TOKEN), 4096).T
    else:
        w = draw(torch.cat([ALONG[coordinate](i) for i in range(512)]), 512)
    for distance in (1, 2, 3, 4, 16, 64, 256):
        a, b = w[:-distance].flatten(), w[distance:].flatten()
        squares = torch.bincount((a * 16).long() * 16 + (b * 16).long(), minlength=256).double()
        assert abs(chi2_sigma(squares, a.numel() / 256)) < 4, distance
        correlation = ((a - 0.5) * (b - 0.5)).mean().item() * 12 * math.sqrt(a.numel())
        assert abs(correlation) < 4, distance


def test_one_bit_of_any_coordinate_changes_half_of_the_bits():
    """Avalanche: over ids and rows, every output bit flips with probability 1/2 for every flipped input bit."""
    ids = torch.arange(2000)

    def bits(seed, update, samples, token, vocabulary, draw=0):
        w = uniform(split_keys(noise_keys(seed, update, samples, token, draw)), vocabulary.to(torch.int32))
        return (w.double() * 2**24).long()[:, None] >> torch.arange(24) & 1

    before = bits(SEED, UPDATE, ids, TOKEN, ids)
    for bit in (0, 1, 5, 13):
        flip = 1 << bit
        for after in (
            bits(SEED ^ flip, UPDATE, ids, TOKEN, ids),
            bits(SEED, UPDATE ^ flip, ids, TOKEN, ids),
            bits(SEED, UPDATE, ids ^ flip, TOKEN, ids),
            bits(SEED, UPDATE, ids, TOKEN ^ flip, ids),
            bits(SEED, UPDATE, ids, TOKEN, ids ^ flip),
            bits(SEED, UPDATE, ids, TOKEN, ids, draw=flip),
        ):
            assert ((before ^ after).double().mean(0) - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize("impl", ["reference", "tile"])
def test_a_million_sampled_tokens_follow_the_softmax(impl):
    if impl == "tile" and native.compiler() is None:
        pytest.skip("the tile version needs a C++ compiler")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 4, generator=generator)
    hidden = torch.randn(1, 4, generator=generator)
    keys = torch.cat([noise_keys(SEED, update, torch.arange(10_000), 0) for update in range(100)])
    out = gumbel_embed(hidden.expand(len(keys), 4).contiguous(), weight, weight, 1.0, keys, impl=impl)
    expected = (hidden @ weight.T).double().softmax(-1)[0] * len(keys)
    assert abs(chi2_sigma(torch.bincount(out.ids, minlength=12).double(), expected)) < 3.5
