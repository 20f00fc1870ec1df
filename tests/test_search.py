"""Searches among explanations, on a tiny real model."""

import importlib.util
import json
import re
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_lens import make_run

from megalens import Lens
from megalens.evaluate import EvaluationError
from megalens.evaluate.measure import Cost, read_by_lens
from megalens.evaluate.metrics import figures, normalised_error, row_statistics
from megalens.evaluate.readers import SUBJECT, other_lens
from megalens.evaluate.text import is_text, pad, to_ids, to_texts
from megalens.explain import candidates
from megalens.explain.search import Greedy, search_named
from megalens.families.adapters import adapter
from megalens.lens.sampling import Sampled
from megalens.lens.verbalizer import PromptEmbedding
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
    best, best_texts = errors(lens, a_BD, search_named("best_of:8"))
    assert (best <= greedy + 1e-6).all()
    assert (best < greedy - 1e-3).any()
    fve = []
    for texts in (greedy_texts, best_texts):
        rebuild = read_by_lens(lens, texts)
        fve.append(figures(row_statistics(a_BD, rebuild.a_hat_BD, loaded.statistics, rebuild.failed_B))["fve_nrm"])
    assert fve[1] > fve[0]


def test_more_explanations_never_make_a_row_worse(lens, a_BD):
    few, many = (errors(lens, a_BD, search_named(f"best_of:{k}"))[0] for k in (2, 5))
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
    got, _ = errors(lens, a_BD, search_named("best_of:3"))
    np.testing.assert_allclose(got, by_draw.min(0), atol=1e-6)


def test_a_row_is_searched_alike_in_any_batch(lens, a_BD):
    rows = torch.arange(len(a_BD))
    whole = search_named("best_of:3")(lens, a_BD, rows)
    parts = [search_named("best_of:3")(lens, a_BD[i : i + 5], rows[i : i + 5]) for i in range(0, len(rows), 5)]
    assert whole.texts == [text for part in parts for text in part.texts]
    assert whole.round_trips == [whole for part in parts for whole in part.round_trips]


def test_noise_is_the_temperature_of_the_draws(lens, a_BD):
    cold = search_named("best_of:3:1e-6")(lens, a_BD, torch.arange(len(a_BD)))
    assert cold.texts == Greedy()(lens, a_BD, torch.arange(len(a_BD))).texts


def test_a_text_that_says_nothing_is_chosen_only_where_no_other_is_there(lens, a_BD, monkeypatch):
    silent_BT = torch.full((len(a_BD), 3), lens.tokenizer.eos_token_id)
    monkeypatch.setattr(lens, "verbalize", lambda a_BD: silent_BT[: len(a_BD)])
    assert all(search_named("best_of:2")(lens, a_BD, torch.arange(len(a_BD))).texts)
    monkeypatch.setattr(lens.verbalizer, "sample", lambda *_, **__: Sampled(silent_BT, None, None))
    assert search_named("best_of:2")(lens, a_BD, torch.arange(len(a_BD))).texts == [""] * len(a_BD)


SWAPPED = "best_of:4+swaps:2:6"


def test_swaps_never_make_a_row_worse_and_some_better(lens, a_BD):
    before, after = (errors(lens, a_BD, search_named(spelling))[0] for spelling in ("best_of:4", SWAPPED))
    assert (after <= before + 1e-6).all()
    assert after.mean() < before.mean() - 0.01


def test_a_swap_counts_only_where_its_string_has_the_same_tokens(lens, a_BD):
    found = candidates.Candidates(lens, a_BD[:4], torch.arange(4))
    found.add(lens.verbalize(a_BD[:4])[:, None])
    texts = [(i, each.ids) for i, each in enumerate(found.best)]
    for place in range(3):
        made = [each for swapped in found.swap(texts, place, [range(3, 203)] * 4, 200, keep=True) for each in swapped]
        assert 100 < len(made) < 4 * 200
        assert to_ids(lens.tokenizer, [each.text for each in made]) == [each.ids for each in made]
        assert all(is_text(each.text) for each in made)
    read = read_by_lens(lens, [each.text for each in found.best])
    assert [each.score for each in found.best] == pytest.approx(normalised_error(a_BD[:4], read.a_hat_BD), abs=1e-5)


def test_a_sweep_that_finds_nothing_new_reads_nothing(lens, a_BD):
    rows = torch.arange(len(a_BD))
    many, more = (search_named(f"swaps:{sweeps}:4")(lens, a_BD, rows) for sweeps in (9, 10))
    assert many.texts == more.texts
    assert [cost.reads for cost in many.costs] == [cost.reads for cost in more.costs]


@pytest.fixture(params=[False, True], ids=["no suffix", "suffix"])
def suffix(request, lens):
    """With and without embeddings behind the text."""
    lens.reconstructor.suffix = PromptEmbedding(torch.randn(2, 64, generator=torch.Generator().manual_seed(0))) if request.param else None
    yield
    lens.reconstructor.suffix = None


@pytest.mark.parametrize("order", ["last_first", "forward"])
def test_a_swap_behind_a_prefix_that_was_read_once_is_read_as_the_whole_text(lens, monkeypatch, order, suffix):
    monkeypatch.setattr(lens.reconstructor, "first_is_last", order == "last_first")
    texts = [[40, 50, 60, 70], [41, 51], [42, 52, 62]]
    ids_GT, lengths_G = pad(texts)
    for place in range(4):
        swaps = [(g, 100 + 7 * place + g + n) for g, ids in enumerate(texts) for n in range(g + 1) if place < len(ids)]
        group_B, token_B = torch.tensor(swaps).unbind(1)
        whole = []
        for g, token in swaps:
            ids = list(texts[g])
            ids[(place + 1) % len(ids) if order == "last_first" else place] = token
            whole.append(ids)
        got, wanted = lens.reconstruct_swaps(ids_GT, lengths_G, place, group_B, token_B), lens.reconstruct(*pad(whole))
        assert ((got - wanted).norm(dim=-1) < 1e-5 * wanted.norm(dim=-1)).all()


def test_a_beam_is_what_is_found_by_reading_every_beginning_alone(lens, a_BD):
    """The plain reference."""
    rows = torch.arange(6)
    found = search_named("beam:2:4")(lens, a_BD[:6], rows).texts

    def error(i, ids):
        a_hat_BD = lens.reconstruct(torch.tensor([ids]), torch.tensor([len(ids)]))
        text = to_texts(lens.tokenizer, torch.tensor([ids]))
        whole = is_text(text[0]) and to_ids(lens.tokenizer, text) == [ids]
        return float(normalised_error(a_BD[i : i + 1], a_hat_BD)[0]) if whole else float("inf")

    for i in rows.tolist():
        beams = [[]]
        for _ in range(3):
            made = []
            for ids in beams:
                likeliest = lens.verbalizer.likeliest(a_BD[i : i + 1], torch.tensor([[*ids, 0]]), 4)[0, -1].tolist()
                made += [(error(i, [*ids, token]), [*ids, token]) for token in likeliest]
            beams = [ids for score, ids in sorted(made)[:2] if score < float("inf")]
        greedy = errors(lens, a_BD[i : i + 1], Greedy())
        best = min((error(i, ids), to_texts(lens.tokenizer, torch.tensor([ids]))[0]) for ids in beams) if beams else (np.inf, "")
        assert found[i] == (best[1] if best[0] < greedy[0][0] else greedy[1][0])


def test_the_likeliest_tokens_are_those_of_the_largest_log_probability(lens, a_BD):
    ids_BT = torch.tensor([[40, 50, 60]]).expand(2, -1)
    likeliest_BTK = lens.verbalizer.likeliest(a_BD[:2], ids_BT, 3)
    for place in range(3):
        every_VT = ids_BT[:1].repeat(512, 1)
        every_VT[:, place] = torch.arange(512)
        log_prob_V = lens.verbalizer.log_prob_of(a_BD[:1].expand(512, -1), every_VT)[:, place]
        assert likeliest_BTK[0, place].tolist() == log_prob_V.topk(3).indices.tolist()


@pytest.mark.parametrize("spelling", [SWAPPED, "best_of:3+swaps:1:5+price:0.05", "beam:2:4"])
def test_swaps_and_prices_are_alike_in_any_batch_and_order(lens, a_BD, spelling):
    rows, search = torch.arange(len(a_BD)), search_named(spelling)
    whole = search(lens, a_BD, rows)
    order = rows.flip(0)
    parts = [search(lens, a_BD[i], i) for i in order.split(5)]
    assert whole.texts == [text for part in parts for text in part.texts][::-1]
    assert whole.costs == [cost for part in parts for cost in part.costs][::-1]


def test_the_cost_is_what_the_models_were_given(lens, a_BD, monkeypatch):
    counted = {"reads": 0, "said": 0, "priced": 0}

    def spy(owner, name, key, number):
        inner = getattr(owner, name)

        def counting(*arguments, **options):
            result = inner(*arguments, **options)
            counted[key] += number(arguments, result)
            return result

        monkeypatch.setattr(owner, name, counting)

    spy(lens, "reconstruct", "reads", lambda given, _: int((given[1] > 0).sum()))
    spy(lens, "reconstruct_swaps", "reads", lambda given, _: 0 if given[4].tolist() == [0] else len(given[4]))
    spy(lens, "verbalize", "said", lambda _, ids_BT: ids_BT.numel())
    spy(lens.verbalizer, "sample", "said", lambda _, texts: texts.ids_NT.numel())
    spy(lens.verbalizer, "likeliest", "said", lambda given, _: given[1].numel())
    spy(candidates, "nats_per_token", "priced", lambda given, _: len(given[1]))
    said = search_named("best_of:3+beam:2:3+swaps:2:5+price:0.05")(lens, a_BD, torch.arange(len(a_BD)))
    assert {key: sum(getattr(cost, key) for cost in said.costs) for key in counted} == counted
    assert Greedy()(lens, a_BD, torch.arange(len(a_BD))).costs == [Cost(said=3)] * len(a_BD)


def test_a_price_of_0_is_no_price(lens, a_BD):
    rows = torch.arange(len(a_BD))
    free, none = (search_named(spelling)(lens, a_BD, rows) for spelling in (SWAPPED + "+price:0", SWAPPED))
    assert free == none
    assert search_named(SWAPPED + "+price:0").name == search_named(SWAPPED).name


def test_a_price_is_paid_for_every_nat_per_token(lens, a_BD):
    """The plain reference: all candidates scored one by one."""
    rows, price = torch.arange(len(a_BD)), 0.3
    drawn = [lens.verbalize(a_BD)]
    drawn += [lens.verbalizer.decode(a_BD, lambda t, k=k: noise_keys(lens.config.seed, 0, rows, t, k)).ids_BT for k in (1, 2, 3)]
    scores = []
    for ids_BT in drawn:
        texts = to_texts(lens.tokenizer, ids_BT)
        nats = [nats_by_hand(lens, ids) for ids in to_ids(lens.tokenizer, texts)]
        scores.append(normalised_error(a_BD, read_by_lens(lens, texts).a_hat_BD) + price * np.array(nats))
    best = np.stack(scores).argmin(0)
    wanted = [to_texts(lens.tokenizer, drawn[k][i : i + 1])[0] for i, k in enumerate(best)]
    assert search_named(f"best_of:4+price:{price}")(lens, a_BD, rows).texts == wanted
    assert search_named("best_of:4")(lens, a_BD, rows).texts != wanted


def nats_by_hand(lens, ids):
    """``-log p`` per token of a text behind the plain prompt, from a whole forward pass of the subject."""
    plain = lens.plain_ids[0].tolist()
    with torch.no_grad(), adapter(lens.subject.lm, None):
        log_p = lens.subject.lm.model(torch.tensor([plain + ids])).logits[0].log_softmax(-1)
    return -float(np.mean([log_p[len(plain) + t - 1, token] for t, token in enumerate(ids)]))


def test_how_often_the_lens_is_called_depends_on_the_number_of_rows_alone(lens, a_BD):
    """Ranks that share a lens's weights gather them block by block."""
    calls, seen = [], []
    hooks = [block.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(lens.subject.lm.blocks)]
    for part_BD in (a_BD[:6], a_BD[6:12], a_BD[:1].expand(6, -1)):
        calls.clear()
        search_named("best_of:3+beam:2:3+swaps:3:4+price:0.05")(lens, part_BD, torch.arange(6))
        seen.append(list(calls))
    for hook in hooks:
        hook.remove()
    assert seen[0] == seen[1] == seen[2] != []


def test_another_lens_reads_texts_in_its_own_order(lens, a_BD, monkeypatch):
    other = other_lens(lens, lens, "there")
    texts = Greedy()(lens, a_BD, torch.arange(len(a_BD))).texts
    torch.testing.assert_close(other.rebuild(lens, texts).a_hat_BD, read_by_lens(lens, texts).a_hat_BD)
    natural = SUBJECT.rebuild(lens, ["river of"]).a_hat_BD
    monkeypatch.setattr(lens.reconstructor, "first_is_last", False)
    ids = to_ids(lens.tokenizer, ["river of"])[0]
    turned = to_texts(lens.tokenizer, torch.tensor([ids[1:] + ids[:1]]))
    torch.testing.assert_close(SUBJECT.rebuild(lens, turned).a_hat_BD, natural)


def test_another_reader_of_another_layer_is_refused(lens, monkeypatch):
    other = copy(lens)
    other.config = replace(lens.config, layer_l=2)
    with pytest.raises(
        EvaluationError, match=r"^evaluation\.other_reader=there reads layer 2 of .*, the lens reads layer 1 of .*; name a lens"
    ):
        other_lens(other, lens, "there")


def test_what_searches_find_is_printed_for_what_it_cost(loaded, capsys):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "search.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_searches", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    folder = Path(loaded.module.config.output_dir) / "tiny" / "best"
    benchmark.main([f"checkpoint={folder}", "--rows=9", "--searches=greedy,best_of:3", "--bootstrap", "20"])
    copied, greedy, best = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [line["search"] for line in (copied, greedy, best)] == ["copy", "greedy", "best of 3"]
    assert (greedy["reads"], best["rows"]) == (0, 9)
    assert best["fve_nrm_low"] <= best["fve_nrm"] >= greedy["fve_nrm"]
    assert best["cpu_seconds"] > 0


def test_every_explanation_names_its_search(loaded):
    assert {token.search for token in loaded.explain(TEXT)} == {"greedy"}
    assert {token.search for token in loaded.explain(TEXT, search="best_of:3")} == {"best of 3"}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("greedy", "greedy"),
        ("best_of:8", "best of 8"),
        ("best_of:2:0.5", "best of 2, noise 0.5"),
        ("best_of:4:1", "best of 4"),
        ("swaps", "2 sweeps of swaps"),
        ("beam:4", "beam of 4"),
        ("beam:4:16", "beam of 4, 16 tokens"),
        ("swaps:1:8", "1 sweep of swaps, 8 tokens"),
        ("best_of:8+swaps:3+price:0.02", "best of 8 + 3 sweeps of swaps + price 0.02"),
    ],
)
def test_a_search_is_asked_for_by_name_and_arguments(spelling, name):
    assert search_named(spelling).name == name


NOT_SEARCHES = [
    "",
    "beam",
    "beam:0",
    "wide:4",
    "best_of",
    "best_of:1",
    "best_of:x",
    "best_of:8:0",
    "best_of:8:1:2",
    "greedy:2",
    "best of 8",
]
NOT_SEARCHES += ["swaps:0", "swaps:1:0", "price:0.1", "swaps+price:-1", "swaps+price:0+price:1", "best_of:8+", "swaps,greedy"]


@pytest.mark.parametrize("spelling", NOT_SEARCHES)
def test_what_is_no_search_is_refused_in_one_line(spelling):
    with pytest.raises(EvaluationError, match=rf"^'{re.escape(spelling)}' is no search; write greedy, or best_of:K"):
        search_named(spelling)
