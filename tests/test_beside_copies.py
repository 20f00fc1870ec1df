"""Figures that compare a lens with copies and with another reader, on made-up vectors, where what they must be is known."""

import numpy as np
import pytest
import torch

from megalens.evaluate.measure import Rebuild
from megalens.evaluate.metrics import figures, row_statistics
from megalens.evaluate.trust.beside_copies import FIGURES, copied_tokens, halves, trust_statistics
from megalens.statistics import ActivationStatistics

ROWS, WIDTH = 600, 16
DOCUMENTS = np.arange(ROWS) // 3


@pytest.fixture(scope="module")
def made():
    """Activations with a mean, their statistics, and a copy that gets half of each right."""
    draw = torch.Generator().manual_seed(0)
    a_BD = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64) + 1.0
    unit = a_BD / a_BD.norm(dim=-1, keepdim=True)
    noise = torch.randn(2, ROWS, WIDTH, generator=draw, dtype=torch.float64)
    return a_BD, ActivationStatistics(a_BD.mean(0), a_BD.var(0), unit.mean(0)), a_BD + noise[0], noise[1]


def measured(made, texts_BD, copy_BD, other_texts_BD, other_copy_BD, bootstrap=0):
    a_BD, statistics = made[:2]
    good = torch.zeros(len(a_BD), dtype=torch.bool)
    texts, copies, *others = (Rebuild(x, good) for x in (texts_BD, copy_BD, other_texts_BD, other_copy_BD))
    rows = row_statistics(a_BD, texts_BD, statistics)
    rows |= trust_statistics(a_BD, texts, copies, statistics, dict(zip(("texts", "copies"), others, strict=True)))
    return figures(rows | {"half": halves(DOCUMENTS)}, DOCUMENTS, bootstrap, of=FIGURES)


def gain(made, texts_BD, bootstrap=0):
    return measured(made, texts_BD, made[2], texts_BD, made[2], bootstrap)


@pytest.mark.parametrize("scale", [1.0, 3.0, -0.5])
def test_a_copy_of_the_copy_gains_nothing_at_any_scale(made, scale):
    assert gain(made, scale * made[2])["gain_over_copy"] == pytest.approx(0, abs=1e-9)


def test_the_mean_gains_nothing(made):
    mean_BD = made[1].mean_normalised.expand(ROWS, -1)
    assert gain(made, mean_BD)["gain_over_copy"] == pytest.approx(0, abs=1e-9)


def test_a_perfect_rebuild_gains_all_that_the_copy_leaves(made):
    a_BD, statistics, copy_BD, _ = made
    unit, copied = (x / x.norm(dim=-1, keepdim=True) for x in (a_BD, copy_BD))
    mean_D, left, spread = statistics.mean_normalised, 0.0, 0.0
    for fit in (0, 1):  # by hand: each half's fit on the other
        inside, outside = (torch.from_numpy(halves(DOCUMENTS) == half) for half in (fit, 1 - fit))
        by_ND2 = torch.stack([copied, mean_D.expand(ROWS, -1)], -1)
        weights = torch.linalg.lstsq(by_ND2[inside].reshape(-1, 2), unit[inside].reshape(-1, 1)).solution
        left += float((unit[outside] - (by_ND2[outside] @ weights)[..., 0]).square().sum())
        spread += float((unit[outside] - mean_D).square().sum())
    assert gain(made, a_BD)["gain_over_copy"] == pytest.approx(left / spread, rel=1e-6)


def test_noise_gains_nothing_within_its_interval(made):
    found = gain(made, made[3], bootstrap=200)
    assert found["gain_over_copy_low"] < 0.003
    assert abs(found["gain_over_copy"]) < 0.01


def test_what_texts_add_is_gained(made):
    found = gain(made, made[0] + 0.5 * made[3], bootstrap=200)
    assert found["gain_over_copy_low"] > 0.1


def test_the_channel_is_1_where_another_reader_reads_the_same(made):
    found = measured(made, made[0] + 0.5 * made[3], made[2], made[0] + 0.5 * made[3], made[2])
    assert found["channel"] == pytest.approx(1)
    assert found["other_reader"] == pytest.approx(found["fve_nrm"])


def test_the_channel_is_the_share_that_is_kept_relative_to_copies(made):
    a_BD, statistics, copy_BD, noise_BD = made
    texts_BD, other_BD, other_copy_BD = (a_BD + scale * noise_BD for scale in (0.3, 0.7, 0.5))
    fve = [figures(row_statistics(a_BD, x, statistics))["fve_nrm"] for x in (texts_BD, copy_BD, other_BD, other_copy_BD)]
    wanted = (fve[2] / fve[0]) / (fve[3] / fve[1])
    assert measured(made, texts_BD, copy_BD, other_BD, other_copy_BD)["channel"] == pytest.approx(wanted)


def test_a_code_that_one_reader_alone_knows_has_no_channel(made):
    a_BD = made[0]
    found = measured(made, a_BD, made[2], a_BD[torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))], made[2])
    assert found["channel"] < 0.1


def test_there_is_no_channel_where_the_lens_rebuilds_nothing(made):
    assert "channel" not in measured(made, made[3], made[2], made[3], made[2], bootstrap=20)


CURVE = {1: 0.2, 2: 0.4, 4: 0.6, 8: 0.55, 16: 0.9}


@pytest.mark.parametrize(("fve", "tokens"), [(0.1, 0), (0.2, 1), (0.3, 2**0.5), (0.4, 2), (0.5, 2**1.5), (0.6, 4), (0.75, 8), (0.95, 16)])
def test_a_lens_is_counted_in_copied_tokens_on_the_logarithm_of_their_number(fve, tokens):
    assert copied_tokens(fve, CURVE) == pytest.approx(tokens)


def test_where_more_tokens_are_worth_less_the_smaller_number_counts():
    assert copied_tokens(0.5, {1: 0.6, 2: 0.4}) == 0
    assert copied_tokens(0.58, CURVE) < 4
