"""Floors, ceilings and the whole measurement, on a tiny real model."""

import json

import numpy as np
import pytest
import torch

from megalens.config import Config, Evaluation, Lora, Reconstructor, Verbalizer
from megalens.evaluate import baselines, evaluation
from megalens.evaluate import table as table_module
from megalens.evaluate.baselines import SOURCES, context_tails, partners, read_by_subject
from megalens.evaluate.evaluation import evaluate
from megalens.evaluate.measure import Rebuild, RowScorer, read_by_lens
from megalens.evaluate.table import examples, table
from megalens.evaluate.text import is_text, pad, pieces, round_trips, to_ids, to_texts
from megalens.evaluate.token_means import TokenMeans
from megalens.explain.search import Greedy
from megalens.objective import build_lens
from megalens.objective.functions import kl_from_logits
from megalens.objective.reference import next_logits
from megalens.page.text import visible
from megalens.statistics import ActivationStatistics
from megalens.tiny import make_model, make_text

MIN_POS = 6


class Rows:
    """Held-out rows as the loader gives them, read by the lens's own subject."""

    def __init__(self, lens, texts, context=24, per_document=2):
        draw = np.random.default_rng(0)
        ids, positions, doc_ids = [], [], []
        for document, text in enumerate(texts):
            row = lens.tokenizer(text)["input_ids"][:context]
            for position in draw.choice(np.arange(MIN_POS, len(row)), per_document, replace=False):
                ids.append(row[: position + 1])
                positions.append(position)
                doc_ids.append(document + 100)
        order = draw.permutation(len(ids))
        input_ids, _ = pad([ids[i] for i in order])
        position = torch.tensor([positions[i] for i in order])
        self.batch = {
            "activation": lens.subject.read(input_ids, position).activation_BD.float(),
            "input_ids": input_ids,
            "position": position,
            "sample_id": torch.arange(len(order)),
            "doc_id": torch.tensor([doc_ids[i] for i in order]),
        }
        self.num_rows = len(order)

    def rows(self, indices):
        return {name: value[torch.as_tensor(np.asarray(indices))] for name, value in self.batch.items()}

    def documents(self):
        return self.batch["doc_id"]


def make_lens(folder, **keys):
    config = Config(
        model_name=str(folder),
        layer_l=1,
        t_text=4,
        dtype="fp32",
        device="cpu",
        verbalizer=Verbalizer(mode="lora"),
        reconstructor=Reconstructor(mode="lora"),
        lora=Lora(r=4),
        evaluation=Evaluation(batch_size=7, bootstrap=50, examples=3, report_documents=2),
        **keys,
    )
    lens = build_lens(config, torch.zeros(64), torch.ones(64))
    torch.manual_seed(1)
    for parameter in lens.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return lens


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = make_text(tmp_path_factory.mktemp("text") / "t.jsonl", documents=15)
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def lens(request, tmp_path_factory):
    return make_lens(make_model(tmp_path_factory.mktemp("model") / request.param, kind=request.param))


@pytest.fixture(scope="module")
def loader(lens, texts):
    rows = Rows(lens, texts)
    lens.mean, lens.var = rows.batch["activation"].mean(0), rows.batch["activation"].var(0)
    return rows


@pytest.fixture(scope="module")
def statistics(loader):
    a_BD = loader.batch["activation"].double()
    unit = a_BD / a_BD.norm(dim=-1, keepdim=True)
    return ActivationStatistics(a_BD.mean(0), a_BD.var(0), unit.mean(0))


def token_means(loader, statistics):
    batch = loader.batch
    token_N = batch["input_ids"].gather(1, batch["position"][:, None])[:, 0].numpy()
    return TokenMeans(token_N, batch["activation"].numpy(), statistics.mean.numpy())


@pytest.fixture(scope="module")
def result(lens, loader, statistics):
    result = evaluate(lens, loader, lens.config, statistics, Greedy(), progress=False, token_means=token_means(loader, statistics))
    result.setting["statistics"] = "of these very rows"
    return result


def test_every_floor_and_ceiling_is_measured_on_the_same_rows(result, loader):
    assert list(result.figures) == list(SOURCES)
    assert result.setting["rows"] == loader.num_rows == 30
    assert result.setting["documents"] == 15
    names = {"fve", "fve_std", "fve_nrm", "cos", "cos_q05", "cos_q50", "cos_q95", "kl", "kl_recovered", "top1", "failed"}
    for each in result.figures.values():
        assert set(each) == {name + end for name in names for end in ("", "_low", "_high")}


def test_gold_patched_back_changes_nothing(result):
    gold = result.figures["gold"]
    assert gold["kl"] == pytest.approx(0, abs=1e-5)
    assert gold["top1"] == gold["fve"] == gold["fve_nrm"] == gold["fve_std"] == 1
    assert gold["kl_recovered"] == pytest.approx(1, abs=1e-4)


def test_the_mean_activation_recovers_nothing(result):
    mean = result.figures["mean"]
    assert mean["fve"] == pytest.approx(0, abs=1e-5)
    assert mean["kl_recovered"] == 0


def test_the_result_is_plain_json(result):
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_measuring_twice_gives_the_same(lens, loader, statistics, result):
    again = evaluate(lens, loader, lens.config, statistics, Greedy(), progress=False, token_means=token_means(loader, statistics))
    assert again.figures == result.figures


def test_the_first_rows_are_the_examples(result, loader, lens):
    assert [e["position"] for e in result.examples] == loader.batch["position"][:3].tolist()
    assert result.examples[0]["explanation"] == to_texts(lens.tokenizer, lens.verbalize(loader.batch["activation"][:1]))[0]


def test_documents_are_explained_at_every_token(result, loader):
    ids = loader.batch["doc_id"].tolist()
    first_two = list(dict.fromkeys(ids))[:2]
    assert [d["doc_id"] for d in result.documents] == first_two
    for document in result.documents:
        longest = max(p for p, d in zip(loader.batch["position"].tolist(), ids, strict=True) if d == document["doc_id"])
        assert len(document["tokens"]) == longest + 1


def test_the_table_shows_our_lens_beside_every_source(result):
    text = table(result)
    for label, _ in SOURCES.values():
        assert text.count(label) == 2
    lines = text.split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert f"{result.figures['lens']['fve_nrm']:.3f} [" in text
    assert "30 held-out activations of 15 documents" in text
    assert len(examples(result).splitlines()) == 4


def test_a_lens_that_says_nothing_scores_as_the_mean(lens, loader, statistics, monkeypatch):
    monkeypatch.setattr(lens, "verbalize", lambda a_BD: torch.full((len(a_BD), 4), lens.tokenizer.eos_token_id))
    silent = evaluate(lens, loader, lens.config, statistics, Greedy(), progress=False, with_documents=False)
    assert silent.figures["lens"]["failed"] == 1
    assert silent.roundtrip == 0
    for name in ("fve", "fve_std", "fve_nrm", "cos", "kl", "top1"):
        assert silent.figures["lens"][name] == pytest.approx(silent.figures["mean"][name], abs=1e-6)


def test_fewer_rows_are_used_when_asked_for(lens, loader, statistics):
    lens.config.evaluation.num_samples = 5
    short = evaluate(lens, loader, lens.config, statistics, Greedy(), progress=False, with_documents=False)
    lens.config.evaluation.num_samples = -1
    assert short.setting["rows"] == 5


def test_copies_are_the_last_tokens_in_natural_order(lens, loader):
    batch = loader.rows(range(4))
    got = to_ids(lens.tokenizer, context_tails(lens.tokenizer, batch["input_ids"], batch["position"], torch.full((4,), 4)))
    wanted = [batch["input_ids"][i, p - 3 : p + 1].tolist() for i, p in enumerate(batch["position"].tolist())]
    assert got == wanted


def test_the_untouched_subject_rebuilds_a_whole_context_exactly(lens, loader):
    batch = loader.rows(range(6))
    whole = context_tails(lens.tokenizer, batch["input_ids"], batch["position"], torch.full((6,), 1000))
    torch.testing.assert_close(read_by_subject(lens, whole).a_hat_BD, batch["activation"], atol=1e-4, rtol=1e-4)


def test_the_subject_reads_copies_without_adapters_and_the_lens_with(lens, loader):
    texts = context_tails(lens.tokenizer, loader.batch["input_ids"], loader.batch["position"], torch.full((loader.num_rows,), 4))
    alone = lens.subject.residual(torch.tensor([lens.tokenizer(texts[0])["input_ids"]]))[0, -1]
    torch.testing.assert_close(read_by_subject(lens, texts).a_hat_BD[0], alone, atol=1e-4, rtol=1e-4)
    ids_BT, lengths_B = pad(to_ids(lens.tokenizer, texts))
    torch.testing.assert_close(read_by_lens(lens, texts).a_hat_BD, lens.reconstruct(ids_BT, lengths_B))


def test_texts_of_different_lengths_read_as_each_alone(lens):
    texts = ["a", "the river flows south", "", " castle\n"]
    together = read_by_lens(lens, texts)
    for i, text in enumerate(texts):
        torch.testing.assert_close(together.a_hat_BD[i], read_by_lens(lens, [text]).a_hat_BD[0], atol=1e-4, rtol=1e-4)
    assert together.failed_B.tolist() == [False, False, True, False]


def test_no_row_is_given_an_explanation_of_its_own_document():
    doc_ids = np.random.default_rng(0).integers(0, 9, 100)
    other = partners(doc_ids)
    assert sorted(other) == list(range(100))
    assert (doc_ids[other] != doc_ids).all()


def test_special_tokens_are_no_text_and_their_names_are_plain_text(lens):
    tokenizer = lens.tokenizer
    assert to_texts(tokenizer, torch.tensor([[tokenizer.eos_token_id] * 3])) == [""]
    ids = to_ids(tokenizer, [tokenizer.eos_token])[0]
    assert tokenizer.eos_token_id not in ids
    assert len(ids) > 1


def test_roundtrip_sees_what_its_string_does_not_tokenise_to(lens):
    said = to_ids(lens.tokenizer, ["the river", "the river"])
    said[1] = to_ids(lens.tokenizer, list("the river"))
    said[1] = [i for part in said[1] for i in part]
    for row, wanted in zip(said, (True, False), strict=True):
        ids_BT = torch.tensor([row])
        assert round_trips(lens.tokenizer, ids_BT, to_texts(lens.tokenizer, ids_BT)) == [wanted]


def test_pieces_join_to_the_text_and_keep_characters_whole(lens):
    text = " the river été 漢字 🙂 flows\nsouth"
    ids = to_ids(lens.tokenizer, [text])[0]
    parts = pieces(lens.tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert "".join(pieces(lens.tokenizer, ids[:-1] + to_ids(lens.tokenizer, ["é"])[0][:1])).endswith("\ufffd")  # cut inside a character


@pytest.mark.parametrize(("text", "says"), [("", False), (" \n", False), ("\ufffd \ufffd", False), ("a", True), ("\ufffda", True)])
def test_a_text_is_what_says_something(text, says):
    assert is_text(text) == says


def test_visible_text_stays_on_its_line_and_sends_the_terminal_nothing():
    assert visible("a\nb\tc") == "a⏎b⇥c"
    assert visible("\x1b[31m\u202eabc\x00\ud800") == "\ufffd[31m\ufffdabc\ufffd\ufffd"


def test_a_new_baseline_is_one_function(lens, loader, statistics, monkeypatch):
    monkeypatch.setattr(baselines, "SOURCES", dict(SOURCES))

    @baselines.source("zero", "nothing at all")
    def zero(given):
        return Rebuild(torch.zeros_like(given.batch["activation"]), torch.zeros(len(given.texts), dtype=torch.bool))

    for module in (evaluation, table_module):
        monkeypatch.setattr(module, "SOURCES", baselines.SOURCES)
    measured = evaluate(lens, loader, lens.config, statistics, Greedy(), progress=False, with_documents=False)
    measured.setting["statistics"] = "of these very rows"
    assert measured.figures["zero"]["cos"] == 0
    assert "nothing at all" in table(measured)


def test_scores_equal_whole_forward_passes(lens, loader, statistics):
    """The plain reference: each text alone, the subject's whole forward pass with the rebuild in the activation's place."""
    batch, texts = loader.rows(range(6)), ["a river", "castle", "", "the", "of Arden and", "\ufffd"]
    got = RowScorer(lens, batch, statistics)(read_by_lens(lens, texts))
    true_BV = next_logits(lens, batch, None)
    mean_D = statistics.mean.float()
    for i, text in enumerate(texts):
        ids = to_ids(lens.tokenizer, [text])[0]
        a_hat_D = lens.reconstruct(torch.tensor([ids]), torch.tensor([len(ids)]))[0] if is_text(text) else mean_D
        one = {name: value[i : i + 1] for name, value in batch.items()}
        for name, patch_D in (("kl", a_hat_D), ("kl_mean", mean_D)):
            kl = kl_from_logits(true_BV[i], next_logits(lens, one, patch_D[None])[0])
            assert got[name][i] == pytest.approx(float(kl), abs=2e-4)
        assert got["error"][i] == pytest.approx(float((batch["activation"][i] - a_hat_D).square().sum()), rel=1e-3)
    assert got["failed"].tolist() == [0, 0, 1, 0, 0, 1]


def test_how_often_a_block_runs_does_not_depend_on_the_texts(lens, loader, statistics):
    """Ranks that share a lens's weights gather them block by block: a rank with empty texts must not run fewer."""
    batch, calls = loader.rows(range(4)), []
    hooks = [block.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(lens.subject.lm.blocks)]
    seen = []
    for texts in ([""] * 4, ["a", "", "the river flows south", "b"], ["river"] * 4):
        calls.clear()
        RowScorer(lens, batch, statistics)(read_by_lens(lens, texts))
        seen.append(list(calls))
    for hook in hooks:
        hook.remove()
    assert seen[0] == seen[1] == seen[2] != []


def test_an_empty_text_beside_others_reads_as_the_bare_prompt(lens):
    nothing_BT = torch.zeros(1, 0, dtype=torch.long)
    bare = lens.reconstruct(nothing_BT, torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(read_by_lens(lens, [""]).a_hat_BD, bare, atol=1e-5, rtol=1e-5)
