"""Searches among explanations, on a tiny real model."""

import numpy as np
import pytest
import torch
from saved_lens import make_run

from megalens import Lens
from megalens.evaluate import EvaluationError
from megalens.evaluate.measure import read_by_lens
from megalens.evaluate.metrics import figures, normalised_error, row_statistics
from megalens.evaluate.text import is_text, to_texts
from megalens.explain.search import BestOf, Greedy, search_named
from megalens.ops import noise_keys

TEXT = "Arden is a river known since 1300."


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return Lens.from_pretrained(make_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def lens(loaded):
    return loaded.module


@pytest.fixture(scope="module")
def a_BD(lens):
    ids = lens.tokenizer(TEXT * 2)["input_ids"]
    return lens.subject.residual(torch.tensor([ids]))[0].float()


def errors(lens, a_BD, search):
    """``|u - u_hat|^2`` per row, and the texts."""
    texts = search(lens, a_BD, torch.arange(len(a_BD))).texts
    return normalised_error(a_BD, read_by_lens(lens, texts).a_hat_BD), texts


def test_best_of_8_is_rebuilt_at_least_as_well_as_greedy_in_every_row(loaded, lens, a_BD):
    greedy, greedy_texts = errors(lens, a_BD, Greedy())
    best, best_texts = errors(lens, a_BD, BestOf(8))
    assert (best <= greedy + 1e-6).all()
    assert (best < greedy - 1e-3).any()
    fve = []
    for texts in (greedy_texts, best_texts):
        rebuild = read_by_lens(lens, texts)
        fve.append(figures(row_statistics(a_BD, rebuild.a_hat_BD, loaded.statistics, rebuild.failed_B))["fve_nrm"])
    assert fve[1] > fve[0]


def test_more_explanations_never_make_a_row_worse(lens, a_BD):
    few, many = (errors(lens, a_BD, BestOf(k))[0] for k in (2, 5))
    assert (many <= few + 1e-6).all()


def test_the_chosen_one_is_the_best_of_those_drawn_one_by_one(lens, a_BD):
    """The plain reference: every draw in turn, the smallest error kept."""
    rows = torch.arange(len(a_BD))
    drawn = [to_texts(lens.tokenizer, lens.verbalize(a_BD))]
    for draw in (1, 2):
        text = lens.verbalizer.decode(a_BD, lambda t, draw=draw: noise_keys(lens.config.seed, 0, rows, t, draw))
        drawn.append(to_texts(lens.tokenizer, text.ids_BT))
    by_draw = np.stack([normalised_error(a_BD, read_by_lens(lens, texts).a_hat_BD) for texts in drawn])
    by_draw[[[not is_text(text) for text in texts] for texts in drawn]] = np.inf
    got, _ = errors(lens, a_BD, BestOf(3))
    np.testing.assert_allclose(got, by_draw.min(0), atol=1e-6)


def test_a_row_is_searched_alike_in_any_batch(lens, a_BD):
    rows = torch.arange(len(a_BD))
    whole = BestOf(3)(lens, a_BD, rows)
    parts = [BestOf(3)(lens, a_BD[i : i + 5], rows[i : i + 5]) for i in range(0, len(rows), 5)]
    assert whole.texts == [text for part in parts for text in part.texts]
    assert whole.round_trips == [whole for part in parts for whole in part.round_trips]


def test_noise_is_the_temperature_of_the_draws(lens, a_BD):
    cold = BestOf(3, noise=1e-6)(lens, a_BD, torch.arange(len(a_BD)))
    assert cold.texts == Greedy()(lens, a_BD, torch.arange(len(a_BD))).texts


def test_a_text_that_says_nothing_is_chosen_only_where_no_other_is_there(lens, a_BD, monkeypatch):
    silent_BT = torch.full((len(a_BD), 3), lens.tokenizer.eos_token_id)
    monkeypatch.setattr(lens, "verbalize", lambda a_BD: silent_BT[: len(a_BD)])
    assert all(BestOf(2)(lens, a_BD, torch.arange(len(a_BD))).texts)
    monkeypatch.setattr(lens.verbalizer, "decode", lambda a_BD, *_, **__: type("Text", (), {"ids_BT": silent_BT}))
    assert BestOf(2)(lens, a_BD, torch.arange(len(a_BD))).texts == [""] * len(a_BD)


def test_every_explanation_names_its_search(loaded):
    assert {token.search for token in loaded.explain(TEXT)} == {"greedy"}
    assert {token.search for token in loaded.explain(TEXT, search="best_of:3")} == {"best of 3"}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("greedy", "greedy"), ("best_of:8", "best of 8"), ("best_of:2:0.5", "best of 2, noise 0.5"), ("best_of:4:1", "best of 4")],
)
def test_a_search_is_asked_for_by_name_and_arguments(spelling, name):
    assert search_named(spelling).name == name


NOT_SEARCHES = ["", "beam:4", "best_of", "best_of:1", "best_of:x", "best_of:8:0", "best_of:8:1:2", "greedy:2", "best of 8"]


@pytest.mark.parametrize("spelling", NOT_SEARCHES)
def test_what_is_no_search_is_refused_in_one_line(spelling):
    with pytest.raises(EvaluationError, match=rf"^'{spelling}' is no search; write greedy, or best_of:K"):
        search_named(spelling)
