"""Figures of trust on rows made by hand: each must say what it claims where the answer is known, in any order of the rows."""

import numpy as np
import pytest

from megalens.evaluate.token_means import TokenMeans
from megalens.evaluate.trust import chance, consensus, identify, judged, unusual, words
from megalens.evaluate.trust.judged import Line, judge

ROWS, D = 600, 24


@pytest.fixture(scope="module")
def rows():
    """Unit activations of 200 documents with three rows each, two topics, few tokens."""
    draw = np.random.default_rng(0)
    u_ND = draw.normal(size=(ROWS, D)) + 2.0
    u_ND /= np.linalg.norm(u_ND, axis=1, keepdims=True)
    doc_ids = np.repeat(np.arange(ROWS // 3), 3)
    return {"u": u_ND, "mean": u_ND.mean(0), "doc": doc_ids, "sample": draw.permutation(ROWS), "token": draw.integers(0, 20, ROWS)}


def ones(statistic):
    return float(statistic(np.ones((1, ROWS)))[0])


# ------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(("shift", "verdict"), [(0.3, "pass"), (0.0, "open"), (-0.3, "fail")])
def test_a_verdict_is_the_side_of_the_line_on_which_the_whole_interval_lies(rows, shift, verdict):
    value_N = np.random.default_rng(1).normal(size=ROWS) + shift
    value_N -= value_N.mean() - shift
    found = judge(judged.mean(value_N), rows["doc"], Line(0.0), 300)
    assert found.verdict == verdict and found.low < found.value < found.high


def test_between_two_lines_a_verdict_is_open(rows):
    value_N = np.full(ROWS, 0.07)
    assert judge(judged.mean(value_N), rows["doc"], Line(0.10, fails=0.05)).verdict == "open"
    assert judge(judged.mean(value_N - 0.03), rows["doc"], Line(0.10, fails=0.05)).verdict == "fail"


def test_an_interval_is_wider_where_rows_of_a_document_agree(rows):
    value_N = np.random.default_rng(2).normal(size=ROWS // 3).repeat(3)
    clustered = judge(judged.mean(value_N), rows["doc"])
    single = judge(judged.mean(value_N), np.arange(ROWS))
    assert clustered.high - clustered.low > 1.4 * (single.high - single.low)


def test_paired_differences_leave_out_what_rows_have_in_common(rows):
    common_N = 10 * np.random.default_rng(3).normal(size=ROWS)
    found = judge(judged.difference(judged.mean(common_N + 0.1), judged.mean(common_N)), rows["doc"], Line(0.0))
    assert found.verdict == "pass" and found.high - found.low < 1e-9


# -------------------------------------------------------------------------------------------------------- identification


@pytest.mark.parametrize("hard", [False, True])
def test_a_perfect_rebuild_is_identified_and_others_are_at_chance(rows, hard):
    partners_NK = partners(rows, hard)
    shuffled_ND = rows["u"][np.roll(np.argsort(rows["doc"]), 100)]
    noise_ND = np.random.default_rng(5).normal(size=(ROWS, D))
    scores = {
        name: np.mean(identify.choice(rows["u"], u_hat_ND, rows["mean"], partners_NK))
        for name, u_hat_ND in {"own": rows["u"], "shuffled": shuffled_ND, "constant": np.ones((ROWS, D)), "noise": noise_ND}.items()
    }
    assert scores["own"] == 1.0
    assert all(0.05 < scores[name] < 0.16 for name in ("shuffled", "noise"))
    if not hard:
        assert 0.05 < scores["constant"] < 0.16


def test_a_rebuild_that_cannot_tell_shares_the_point(rows):
    same_ND = np.repeat(rows["u"][:1], ROWS, 0)
    assert identify.choice(same_ND, rows["u"], rows["mean"], partners(rows, False)) == pytest.approx(0.1)


def partners(rows, hard, order=None):
    order = np.arange(ROWS) if order is None else order
    doc, sample = rows["doc"][order], rows["sample"][order]
    if not hard:
        return identify.drawn_partners(doc, sample, 9)
    return identify.hard_partners(doc, sample, rows["token"][order], rows["u"][order].sum(1), 9)


@pytest.mark.parametrize("hard", [False, True])
def test_partners_are_of_other_documents_and_do_not_depend_on_the_order_of_rows(rows, hard):
    order = np.random.default_rng(4).permutation(ROWS)
    straight, mixed = partners(rows, hard), partners(rows, hard, order)
    assert (rows["doc"][straight] != rows["doc"][:, None]).all()
    assert (rows["sample"][straight[order]] == rows["sample"][order][mixed]).all()
    if hard:  # 20 tokens in 600 rows: there are always nine of the same token
        assert (rows["token"][straight] == rows["token"][:, None]).all()


# ---------------------------------------------------------------------------------------------------------------- chance


def test_noise_is_above_chance_in_one_row_of_twenty(rows):
    draw = np.random.default_rng(6)
    others_NK = draw.normal(size=(ROWS, 5))
    assert 0.02 < ones(chance.above_chance(draw.normal(size=ROWS), others_NK)) < 0.08
    assert ones(chance.above_chance(draw.normal(size=ROWS) + 5, others_NK)) > 0.95


def test_retest_sees_what_repeats_and_not_what_makes_rows_easy():
    draw = np.random.default_rng(7)
    easy_N, own_N = draw.normal(size=ROWS), draw.normal(size=ROWS)
    noise = draw.normal(size=(3, ROWS)) * 0.1
    assert abs(ones(chance.retest(easy_N + noise[0], easy_N + noise[1], easy_N + noise[2]))) < 0.05
    assert ones(chance.retest(own_N + noise[0], own_N + noise[1], easy_N)) > 0.85


def test_confidence_is_shown_only_where_a_second_sample_rises_with_it():
    draw = np.random.default_rng(8)
    own_N, others_NK = draw.normal(size=ROWS) + 2, draw.normal(size=(ROWS, 5)) * 0.5
    true = chance.fit_confidence(own_N, own_N + 0.3 * draw.normal(size=ROWS), others_NK)
    assert true.holds
    assert [true.of(fve) for fve in (-1.0, (true.chance + true.typical) / 2, true.typical, true.high)] == list(chance.CONFIDENCES)
    assert chance.fit_confidence(own_N, draw.normal(size=ROWS), others_NK).of(9.0) is None
    assert true.of(float("nan")) is None


# ----------------------------------------------------------------------------------------------------------------- words


def test_words_are_lower_case_stems_without_function_words():
    assert words.content_words("The Rivers were FLOODING two villages, of course; an ox") == {"river", "flood", "villag", "course"}


def test_echoes_lie_ahead_or_are_invented_and_lifts_subtract_a_partner():
    bag = [frozenset(f"w{row}x{i}" for i in range(4)) for row in range(ROWS)]
    nexts = [frozenset(f"n{row}") for row in range(ROWS)]
    partner_N = np.roll(np.arange(ROWS), 3)
    found = words.kinds_of_words([bag[0] | {"zebra"}], [bag[0]], [frozenset({"zebra"})])
    assert {name: value.tolist() for name, value in found.items()} == {"echo": [4], "ahead": [1], "invented": [0], "words": [5]}
    assert ones(words.kind_lift("echo", bag, bag, nexts, partner_N)) == 1.0
    assert ones(words.kind_lift("invented", bag, bag, nexts, partner_N)) == -1.0
    same = [frozenset({"one", "two"})] * ROWS
    assert ones(words.kind_lift("echo", same, same, nexts, partner_N)) == 0.0


def test_a_lift_counts_only_what_a_partner_does_not_say_too():
    topic = [frozenset({"river"})] * ROWS
    hidden = [frozenset({f"secret{row}"}) for row in range(ROWS)]
    targets = [a | b for a, b in zip(topic, hidden, strict=True)]
    partner_N = np.roll(np.arange(ROWS), 3)
    assert ones(words.said_lift(topic, targets, partner_N)) == 0.0
    half = [text if row % 2 else frozenset() for row, text in enumerate(hidden)]
    assert ones(words.said_lift(half, targets, partner_N)) == pytest.approx(0.25)  # half the rows say one of two words


# ------------------------------------------------------------------------------------------------------------- consensus


def test_equal_samples_agree_wholly_and_precision_counts_what_is_right():
    rows = [[frozenset({"river", "ford"})] * 8, [frozenset()] * 8]
    right = [frozenset({"river"}), frozenset()]
    assert consensus.shares(rows[0]) == {"river": 1.0, "ford": 1.0}
    assert consensus.kept(rows, right, 0.5) == {"precision": 0.5, "coverage": 0.5}
    assert consensus.agreement(rows[0]) == 1.0
    assert consensus.agreement(rows[0], rows[1]) == 0.0


def test_the_calibration_of_a_coin_that_says_how_often_it_is_right_is_exact():
    draw = np.random.default_rng(9)
    rows, right = [], []
    for row in range(1500):
        share = draw.integers(1, 9)
        rows.append([frozenset({f"w{row}"}) if i < share else frozenset() for i in range(8)])
        right.append(frozenset({f"w{row}"}) if draw.random() < share / 8 else frozenset())
    assert consensus.calibration_error(rows, right) < 0.05
    assert consensus.calibration_error(rows, [frozenset()] * 1500) > 0.4


# --------------------------------------------------------------------------------------------------------------- unusual


def test_held_out_rows_are_uniform_in_their_percentile_and_steered_ones_are_not():
    draw = np.random.default_rng(10)
    mix_DD = draw.normal(size=(D, D))

    def sample(count):
        return draw.normal(size=(count, D)) @ mix_DD

    usual = unusual.fit_usual(sample(2000), sample(1000))
    assert 0.0 < (usual.percentile(sample(1000)) > 0.99).mean() < 0.03
    assert (usual.percentile(sample(100) + 12 * mix_DD[0]) > 0.99).mean() > 0.9


def test_shrinkage_is_that_of_ledoit_and_wolf():
    """Against the estimator's own terms, summed plainly row by row."""
    x_ND = np.random.default_rng(11).normal(size=(30, 8)) * np.arange(1, 9)
    x_ND -= x_ND.mean(0)
    sample_DD = x_ND.T @ x_ND / 30
    level = np.trace(sample_DD) / 8
    spread = np.linalg.norm(sample_DD - level * np.eye(8)) ** 2
    noise = sum(np.linalg.norm(np.outer(x, x) - sample_DD) ** 2 for x in x_ND) / 30**2
    expected = (1 - noise / spread) * sample_DD + noise / spread * level * np.eye(8)
    assert unusual.shrunk_covariance(x_ND) == pytest.approx(expected, abs=1e-9)
    assert np.isfinite(np.linalg.inv(unusual.shrunk_covariance(x_ND[:3] - x_ND[:3].mean(0)))).all()  # fewer rows than dimensions


# ----------------------------------------------------------------------------------------------------------- token means


def test_a_token_is_predicted_by_its_shrunk_mean_and_an_unknown_one_by_the_mean_of_all(rows):
    mean_D = rows["u"].mean(0)
    means = TokenMeans(rows["token"], rows["u"], mean_D)
    mine_ND = rows["u"][rows["token"] == 3]
    expected_D = (mine_ND.sum(0) + 8 * mean_D) / (len(mine_ND) + 8)
    predicted_ND = means.predict(np.array([3, 999, -1]))
    assert predicted_ND[0] == pytest.approx(expected_D) and (predicted_ND[1:] == mean_D).all()
    assert means.covered(np.array([3, 999])).tolist() == [True, False]
