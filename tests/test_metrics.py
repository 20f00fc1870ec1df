"""The quality figures, against their definitions written out and against what is known beforehand."""

import numpy as np
import pytest
import torch

from megalens.evaluate import metrics
from megalens.evaluate.metrics import figures, join, logit_statistics, mean_where_failed, row_fve, row_statistics
from megalens.statistics import ActivationStatistics


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    train_ND = torch.randn(500, 16, generator=draw).double() * torch.linspace(0.1, 5, 16) + 2
    a_BD = torch.randn(60, 16, generator=draw) * torch.linspace(0.1, 5, 16) + 2
    a_hat_BD = a_BD + 0.5 * torch.randn(60, 16, generator=draw)
    unit = train_ND / train_ND.norm(dim=-1, keepdim=True)
    return a_BD, a_hat_BD, ActivationStatistics(train_ND.mean(0), train_ND.var(0), unit.mean(0))


def test_figures_equal_their_written_definitions(data):
    a_BD, a_hat_BD, statistics = data
    a, a_hat = a_BD.double().numpy(), a_hat_BD.double().numpy()
    mu, sigma, m = statistics.mean.numpy(), statistics.var.sqrt().numpy(), statistics.mean_normalised.numpy()
    u, u_hat = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, a_hat))
    result = figures(row_statistics(a_BD, a_hat_BD, statistics))
    assert result["fve"] == pytest.approx(1 - ((a - a_hat) ** 2).sum() / ((a - mu) ** 2).sum(), rel=1e-12)
    assert result["fve_std"] == pytest.approx(1 - (((a - a_hat) / sigma) ** 2).sum() / (((a - mu) / sigma) ** 2).sum(), rel=1e-12)
    assert result["fve_nrm"] == pytest.approx(1 - ((u - u_hat) ** 2).sum() / ((u - m) ** 2).sum(), rel=1e-12)
    cos = (u * u_hat).sum(1)
    assert result["cos"] == pytest.approx(cos.mean())
    for name, share in (("cos_q05", 0.05), ("cos_q50", 0.5), ("cos_q95", 0.95)):
        assert result[name] == np.quantile(cos, share, method="inverted_cdf")


def test_a_perfect_rebuild_explains_everything_and_the_mean_nothing(data):
    a_BD, _, statistics = data
    perfect = figures(row_statistics(a_BD, a_BD, statistics))
    assert perfect["fve"] == perfect["fve_std"] == perfect["fve_nrm"] == 1
    mean = figures(row_statistics(a_BD, statistics.mean.expand(60, -1), statistics))
    assert mean["fve"] == mean["fve_std"] == 0
    assert mean["fve_nrm"] < 0  # a unit vector cannot be as close to all as the shorter mean is


def test_fve_is_hurt_by_a_constant_bias(data):
    a_BD, _, statistics = data
    spread = float(((a_BD.double() - statistics.mean) ** 2).sum())
    assert figures(row_statistics(a_BD, a_BD + 1, statistics))["fve"] == pytest.approx(1 - 60 * 16 / spread)


def test_fve_nrm_does_not_see_scale_but_fve_does(data):
    a_BD, a_hat_BD, statistics = data
    once, scaled = (figures(row_statistics(a_BD, factor * a_hat_BD, statistics)) for factor in (1, 3))
    assert scaled["fve_nrm"] == pytest.approx(once["fve_nrm"], abs=1e-6)
    assert scaled["fve"] < once["fve"] - 0.5


def test_a_dimension_that_never_varied_counts_nothing_in_fve_std(data):
    a_BD, a_hat_BD, statistics = data
    var = statistics.var.clone()
    var[3] = 0
    flat = ActivationStatistics(statistics.mean, var, statistics.mean_normalised)
    kept = [i for i in range(16) if i != 3]
    small = ActivationStatistics(statistics.mean[kept], var[kept], statistics.mean_normalised[kept])
    without = figures(row_statistics(a_BD[:, kept], a_hat_BD[:, kept], small))
    assert figures(row_statistics(a_BD, a_hat_BD, flat))["fve_std"] == pytest.approx(without["fve_std"], rel=1e-12)


def test_a_failed_row_scores_as_the_mean_and_is_counted(data):
    a_BD, a_hat_BD, statistics = data
    broken, flagged, mean = a_hat_BD.clone(), torch.zeros(60, dtype=torch.bool), a_hat_BD.double().clone()
    broken[4, 2], broken[5, 0], flagged[6] = float("nan"), float("inf"), True
    mean[4:7] = statistics.mean
    got, wanted = row_statistics(a_BD, broken, statistics, flagged), row_statistics(a_BD, mean, statistics)
    assert got["failed"].tolist() == [0.0] * 4 + [1.0] * 3 + [0.0] * 53
    for name in wanted:
        if name != "failed":
            np.testing.assert_array_equal(got[name], wanted[name])
    assert figures(got)["failed"] == 3 / 60


def test_mean_where_failed_leaves_good_rows_alone():
    a_hat_BD = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [3.0, 4.0]])
    filled, failed = mean_where_failed(a_hat_BD, torch.tensor([7.0, 8.0]))
    assert filled.tolist() == [[1, 2], [7, 8], [3, 4]]
    assert failed.tolist() == [False, True, False]


def test_figures_of_joined_batches_are_those_of_the_whole(data):
    a_BD, a_hat_BD, statistics = data
    parts = [row_statistics(a_BD[i : i + 7], a_hat_BD[i : i + 7], statistics) for i in range(0, 60, 7)]
    assert figures(join(parts)) == figures(row_statistics(a_BD, a_hat_BD, statistics))


def test_fve_nrm_is_the_spread_weighted_mean_of_the_rows_own(data):
    a_BD, a_hat_BD, statistics = data
    rows = row_statistics(a_BD, a_hat_BD, statistics)
    assert figures(rows)["fve_nrm"] == pytest.approx(np.average(row_fve(rows), weights=rows["spread_nrm"]))


def test_kl_and_top1_equal_their_written_definitions():
    draw = torch.Generator().manual_seed(1)
    gold, patched = (torch.randn(9, 30, generator=draw) * 3 for _ in range(2))
    rows = logit_statistics(gold, patched)
    p, q = gold.double().softmax(-1), patched.double().softmax(-1)
    np.testing.assert_allclose(rows["kl"], (p * (p / q).log()).sum(-1), rtol=1e-5)
    assert rows["top1"].tolist() == [float(p[i].argmax() == q[i].argmax()) for i in range(9)]
    np.testing.assert_array_equal(logit_statistics(gold, gold)["kl"], 0)


def test_kl_recovered_is_1_for_gold_and_0_for_the_mean(data):
    a_BD, a_hat_BD, statistics = data
    gold, mean = torch.randn(60, 30), torch.randn(60, 30)
    rows = row_statistics(a_BD, a_hat_BD, statistics) | {"kl_mean": logit_statistics(gold, mean)["kl"]}
    assert figures(rows | logit_statistics(gold, gold))["kl_recovered"] == 1
    assert figures(rows | logit_statistics(gold, mean))["kl_recovered"] == 0
    assert "kl_recovered" not in figures(rows)


def test_a_new_figure_is_one_entry(data, monkeypatch):
    a_BD, a_hat_BD, statistics = data
    worst = metrics.Figure("cos_min", ("cos",), lambda rows, weights_RN: np.where(weights_RN > 0, rows["cos"], 2).min(1))
    monkeypatch.setattr(metrics, "FIGURES", (*metrics.FIGURES, worst))
    rows = row_statistics(a_BD, a_hat_BD, statistics)
    result = figures(rows, np.arange(60), bootstrap=20)
    assert result["cos_min"] == rows["cos"].min() <= result["cos_min_low"] <= result["cos_min_high"]


def test_intervals_resample_documents_not_rows():
    draw = np.random.default_rng(0)
    of_document = draw.normal(size=40)
    rows = {"error": np.repeat(of_document**2, 25), "spread": np.ones(1000), "cos": np.repeat(of_document, 25)}
    by_document = figures(rows, np.repeat(np.arange(40), 25), bootstrap=400)
    by_row = figures(rows, np.arange(1000), bootstrap=400)

    def width(figure, name):
        return figure[f"{name}_high"] - figure[f"{name}_low"]

    for name in ("fve", "cos", "cos_q50"):
        assert by_document[f"{name}_low"] <= by_document[name] <= by_document[f"{name}_high"]
        assert width(by_document, name) > 2.5 * width(by_row, name)  # 25 equal rows per document: about 5 times as wide


def test_the_interval_of_a_mean_is_the_textbook_one():
    draw = np.random.default_rng(3)
    cos = draw.normal(size=900)
    result = figures({"error": cos, "spread": cos, "cos": cos}, np.arange(900), bootstrap=2000)
    assert result["cos_high"] - result["cos_low"] == pytest.approx(2 * 1.96 * cos.std() / 30, rel=0.1)


def test_intervals_depend_on_the_seed_alone(data, monkeypatch):
    a_BD, a_hat_BD, statistics = data
    rows, doc_ids = row_statistics(a_BD, a_hat_BD, statistics), np.arange(60) // 2 + 1000
    whole = figures(rows, doc_ids, bootstrap=50)
    assert whole != figures(rows, doc_ids, bootstrap=50, seed=1)
    monkeypatch.setattr("megalens.evaluate.metrics._CHUNK", 7 * 60)  # seven resamples at a time
    chunked = figures(rows, doc_ids, bootstrap=50)
    assert whole.keys() == chunked.keys()
    assert all(whole[name] == pytest.approx(chunked[name], abs=1e-12) for name in whole)
