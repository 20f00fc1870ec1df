"""The suite of trust on a tiny real model: the same figures in any order of rows and any batch size, and on after a stop."""

import json

import numpy as np
import pytest
import torch
from test_baselines import Rows, make_lens

from megalens.evaluate.token_means import TokenMeans
from megalens.evaluate.trust import planting
from megalens.evaluate.trust.knowledge import copies_of
from megalens.evaluate.trust.parts import Known, Leads
from megalens.evaluate.trust.planted import Concept, Steering, choose_concepts, winner
from megalens.evaluate.trust.rows import TrustRows, trust_rows
from megalens.evaluate.trust.suite import PARTS, keep, kept, run_parts, table
from megalens.explain.search import Greedy
from megalens.statistics import ActivationStatistics
from megalens.tiny import make_model, make_text

PLAIN = tuple(name for name in PARTS if name != "planted")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = make_text(tmp_path_factory.mktemp("text") / "t.jsonl", documents=16)
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    return make_lens(make_model(tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture(scope="module")
def loader(lens, texts):
    rows = Rows(lens, texts, per_document=2)
    lens.mean, lens.var = rows.batch["activation"].mean(0), rows.batch["activation"].var(0)
    return rows


@pytest.fixture(scope="module")
def rows(lens, loader):
    a_BD = loader.batch["activation"].double()
    statistics = ActivationStatistics(a_BD.mean(0), a_BD.var(0), torch.nn.functional.normalize(a_BD, dim=-1).mean(0))
    return trust_rows(lens, loader, statistics, Greedy(), 32, 7)


def known(rows):
    labels = {name: [f"{name} {doc % 5} river" for doc in rows.doc_id_N] for name in ("title", "topic", "gloss")}
    means = TokenMeans(np.array([ids[-1] for ids in rows.contexts]), rows.a_ND.numpy(), rows.statistics.mean.double().numpy())
    return Known(Greedy(), copies_of(rows), ["and so it went"] * len(rows), labels, rows.a_ND.double().numpy(), means)


@pytest.fixture(scope="module")
def found(rows):
    return run_parts(rows, known(rows), 60, PLAIN)


def test_figures_do_not_depend_on_batch_size_or_the_order_of_rows(rows, found):
    order = np.random.default_rng(0).permutation(len(rows))
    mixed = TrustRows(
        rows.lens,
        rows.statistics,
        rows.a_ND[order],
        [rows.contexts[i] for i in order],
        rows.doc_id_N[order],
        rows.sample_id_N[order],
        [rows.texts[i] for i in order],
        rows.round_trip_N[order],
        batch_size=11,
    )
    again = run_parts(mixed, known(mixed), 0, PLAIN)
    for part, figures in found.items():
        for name, value in figures.items():
            if isinstance(value, dict) and "value" in value:
                assert again[part][name]["value"] == pytest.approx(value["value"], abs=1e-5), name
            elif isinstance(value, float):
                assert again[part][name] == pytest.approx(value, abs=1e-5), name


def test_an_untrained_lens_is_at_chance_and_its_intervals_hold_its_figures(found):
    judged = {
        name: value for figures in found.values() for name, value in figures.items() if isinstance(value, dict) and "verdict" in value
    }
    assert len(judged) > 25
    known_ones = [value for value in judged.values() if value["value"] is not None]
    assert len(known_ones) > 20 and all(value["low"] - 1e-9 <= value["value"] <= value["high"] + 1e-9 for value in known_ones)
    assert judged["choice10_hard"]["verdict"] != "pass" and judged["nll_gap"]["verdict"] != "pass"
    assert abs(judged["choice10_shuffled"]["value"] - 0.1) < 0.15
    assert judged["tail_recall"]["value"] < 0.5


def test_the_true_rebuild_passes_what_an_untrained_lens_does_not(rows, monkeypatch):
    monkeypatch.setitem(rows.__dict__, "rebuilt_ND", rows.u_ND)
    monkeypatch.setitem(rows.__dict__, "fve_N", rows.fve(rows.u_ND))
    best = run_parts(rows, known(rows), 60, ("identification", "chance"))
    assert best["identification"]["choice10_hard"]["value"] == 1.0
    assert best["identification"]["choice10_over_token"]["verdict"] == "pass"
    assert best["chance"]["above_chance"]["verdict"] == "pass"


def test_what_is_done_is_kept_for_the_same_setting_alone(rows, tmp_path, monkeypatch):
    path, setting = tmp_path / "trust.json", {"checkpoint": "step-1"}
    first = run_parts(rows, known(rows), 0, ("texts", "words"), after=keep(path, setting))
    assert kept(path, setting) == first and kept(path, {"checkpoint": "step-2"}) == {}
    monkeypatch.setitem(PARTS, "words", lambda *_: pytest.fail("it ran again"))
    both = run_parts(rows, known(rows), 0, ("texts", "words"), kept(path, setting), keep(path, setting))
    assert both == first
    path.write_text("{")
    assert kept(path, setting) == {}
    assert "echo_lift" in table(first)


# ---------------------------------------------------------------------------------------------------------------- planted

LEADS = [
    ("a philosopher of nature", "thought reason ethics school logic mind"),
    ("a river in the north", "water flows lake basin delta mouth"),
]


def concepts():
    glosses, texts = zip(*(LEADS[i % 2] for i in range(100)), strict=True)
    return choose_concepts(glosses, texts)


def test_concepts_are_words_of_glosses_with_lexicons_of_their_own():
    found = concepts()
    assert [len(concept.documents) for concept in found] == [50, 50]
    by_lexicon = {frozenset(concept.lexicon) for concept in found}
    assert any("reason" in words and "water" not in words for words in by_lexicon)


def test_the_point_goes_to_the_named_concept_and_is_shared_where_none_is():
    one, other = Concept("river", (), {"water": 2.0}), Concept("mind", (), {"ethic": 1.0})
    assert winner([one, other], ["the waters of it"]) == {0: 1.0}
    assert winner([one, other], ["ethics"]) == {1: 1.0}
    assert winner([one, other], ["nothing"]) == {0: 0.5, 1: 0.5}
    assert winner([one, other], ["water ethics"], before=["water"]) == {1: 1.0}  # water was said before anything was planted


def test_steering_is_the_subject_with_a_hook_that_adds_to_every_position_but_the_first(lens):
    ids_1C, block = torch.arange(5, 17)[None], 0
    vector_1D = torch.randn(1, lens.subject.d, generator=torch.Generator().manual_seed(0))
    steering = Steering(lens.subject, block)

    def hook(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, 1:] += vector_1D
        return output

    handle = lens.subject.lm.blocks[block].register_forward_hook(hook)
    try:
        with torch.no_grad():
            whole = lens.subject.lm.model(ids_1C, output_hidden_states=True)
            said = lens.subject.lm.model.generate(ids_1C, max_new_tokens=1, do_sample=False, eos_token_id=-1)
    finally:
        handle.remove()
    expected = whole.hidden_states[lens.subject.layer_l + 1][:, -1]
    assert steering.read(ids_1C, vector_1D) == pytest.approx(expected, abs=1e-5)
    assert steering.go_on(ids_1C, vector_1D, 1).tolist() == said[:, -1:].tolist()
    assert steering.read(ids_1C, 0 * vector_1D) == pytest.approx(lens.subject.residual(ids_1C)[:, -1], abs=1e-6)


@pytest.fixture(scope="module")
def planted(rows, texts):
    leads = Leads([rows.lens.tokenizer(text)["input_ids"][:24] for text in texts] * 4, [LEADS[i % 2][1] for i in range(64)], [])
    return planting.prepare(rows, concepts(), leads.ids * 2), rows


def test_a_lens_that_speaks_of_the_planted_concept_hits_and_a_silent_one_is_at_chance(planted, monkeypatch):
    planting_, rows = planted
    names = [next(iter(concept.lexicon)) for concept in planting_.concepts]
    silent = planting.plant(rows, planting_, 60, False)
    for name in ("planted_hit@0.5", "placebo_hit@0.5", "label_hit@0.5"):
        assert silent[name].value == pytest.approx(0.5)
    assert silent["planted_lift@0.5"].value == 0.0 and silent["contexts"] > 3

    def told(rows, a_BD, context, condition):
        kinds = [("plain", 0.0), *planting.conditions()]
        return [[names[k] if kinds[condition][0] == "concept" else "nothing"] * 3 for k in range(len(a_BD))]

    monkeypatch.setattr(planting, "explain", told)
    hit = planting.plant(rows, planting_, 60, False)
    assert hit["planted_hit@0.5"].value == 1.0 and hit["planted_lift@0.5"].verdict == "pass"
    assert hit["placebo_hit@0.5"].value == pytest.approx(0.5)
