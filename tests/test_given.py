"""Given texts: joined to the rows of a dump, each once an epoch, said and read."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from test_lens import at, make_batch
from test_texts import make_lens, model  # noqa: F401  a fixture
from tiny_run import ROWS, make_subject_and_dump, tiny_config

from megalens.config import ConfigError, Given, Verbalizer, config_from_dict, validate
from megalens.data import DataError, texts
from megalens.data.loader import ActivationLoader
from megalens.data.shards import ShardReader
from megalens.data.source import held_out_loader, training_loader
from megalens.families.loading import load_tokenizer
from megalens.objective.functions import relative_mse

TRAINED = {"terms": {"say": 1.0, "read": 1.0}, "given": Given(path="x"), "tail_order": "forward", "mse_weight": 0.0}
SAID = ["the river", "a castle of stone", "it", "he wrote a book about the war and the railway of Arden"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    make_subject_and_dump(folder)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    config = tiny_config(folder, tail_order="forward", verbalizer=Verbalizer(end_token="eos"))
    config.t_text, config.pretokenize.root = 9, str(tmp_path / "tokens")
    config.given = Given(path=str(tmp_path / "texts.jsonl"))
    return config


def write(config, records):
    with open(config.given.path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def records(rows=ROWS["train"]):
    """No text for each fifth row, two for each third, in no order."""
    made = [{"sample_id": n, "text": f"{SAID[n % 4]} {n}"} for n in range(rows) if n % 5]
    made += [{"sample_id": n, "text": f"again {n}"} for n in range(0, rows, 3) if n % 5]
    return [made[i] for i in np.random.default_rng(0).permutation(len(made))]


def seen(batches, tokenizer):
    """(row, text) of what some batches hold."""
    return [
        (n, tokenizer.decode(ids[:length]))
        for batch in batches
        for n, ids, length in zip(batch["sample_id"].tolist(), batch["text_ids"], batch["text_length"].tolist(), strict=True)
    ]


def cut(tokenizer, text, room=8):
    return tokenizer.decode(tokenizer(text)["input_ids"][:room])


def first_batches(loader, count, start=0):
    source = loader.batches(start)
    found = [next(source) for _ in range(count)]
    source.close()
    return found


# ------------------------------------------------------------------------------------------------------------- the join


def test_an_epoch_gives_every_text_once_with_the_row_it_is_of(config, folder, capsys):
    write(config, [*records(), {"sample_id": 4000, "text": "of no row"}, {"sample_id": 1, "text": ""}])
    tokenizer = load_tokenizer(config)
    loader = training_loader(config)
    assert loader.num_rows == len(records()) and loader.steps_per_epoch == loader.num_rows // 8
    wanted = {(r["sample_id"], cut(tokenizer, r["text"])) for r in records()}
    epochs = [seen(first_batches(loader, loader.steps_per_epoch, e * loader.steps_per_epoch), tokenizer) for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == loader.steps_per_epoch * 8 and set(epoch) <= wanted
    assert epochs[0] != epochs[1]
    told = capsys.readouterr().err
    long = sum(len(tokenizer(r["text"])["input_ids"]) > 8 for r in records())
    assert "43 for 32 of 40 rows; 8 rows have none and are left out; 1 texts are of no row; 1 are empty" in told
    assert f"{long} are cut to their first 8 tokens (t_text)" in told
    plain = ActivationLoader(config.activation_dir("train"), 8, 0)
    for batch in first_batches(loader, 2):
        row = plain.rows(batch["sample_id"])
        for name in ("activation", "input_ids", "position", "doc_id"):
            assert torch.equal(batch[name], row[name])


def test_texts_by_document_and_position_in_parquet_are_those_by_number_in_lines(config):
    reader = ShardReader(config.activation_dir("train"))
    doc_id, position = reader.column("doc_id").tolist(), reader.column("position").tolist()
    known = [record for record in records() if record["sample_id"] < 32]  # the second shard's documents have the first one's numbers
    write(config, known)
    by_number = texts.TextReader(reader, texts.prepare(config, reader, config.given.path, False))
    path = config.given.path.replace(".jsonl", ".parquet")
    several: dict[int, list[str]] = {}
    for record in known:
        several.setdefault(record["sample_id"], []).append(record["text"])
    table = [{"doc_id": doc_id[n], "position": position[n], "text": each, "other": n} for n, each in several.items()]
    pa.parquet.write_table(pa.Table.from_pylist([*table, {"doc_id": 7, "position": 999, "text": ["nowhere"]}]), path)
    store = texts.prepare(config, reader, path, False)
    by_place = texts.TextReader(reader, store)
    assert store.meta["unknown"] == 1
    tokenizer = load_tokenizer(config)
    every = [seen([r.read_batch(i) for i in range(len(r.batch_rows))], tokenizer) for r in (by_number, by_place)]
    assert sorted(every[0]) == sorted(every[1])


def test_the_order_is_the_same_on_any_ranks_and_workers_and_after_a_resume(config):
    write(config, records())
    whole = first_batches(training_loader(config), 8)
    shares = [first_batches(training_loader(config, rank, 2), 8) for rank in (0, 1)]
    config.loader_workers = 2
    by_workers = first_batches(training_loader(config), 8)
    later = first_batches(training_loader(config), 3, start=5)
    loader = training_loader(config)
    first_batches(loader, 5)
    state, other = loader.state_dict(), training_loader(config)
    other.load_state_dict(state)
    gone_on = [batch for batch, _ in zip(other, range(3), strict=False)]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            assert torch.equal(torch.cat([share[step][name] for share in shares]), value)
            assert torch.equal(by_workers[step][name], value)
            if step >= 5:
                assert torch.equal(later[step - 5][name], value) and torch.equal(gone_on[step - 5][name], value)


def test_texts_are_tokenised_once_and_what_a_killed_process_left_is_removed(config, monkeypatch):
    write(config, records())
    reader = ShardReader(config.activation_dir("train"))
    first = texts.prepare(config, reader, config.given.path, False)
    (dead,) = [first.folder.with_name(f".{first.folder.name}.elsewhere.1.tmp")]
    dead.mkdir()
    (first.folder / "meta.json").rename(dead / "meta.json")
    first.folder.rename(dead.with_name("moved"))
    texts.prepare(config, reader, config.given.path, False)
    assert not dead.exists() and first.folder.is_dir()
    monkeypatch.setattr(texts, "_build", lambda *_: pytest.fail("tokenised again"))
    texts.prepare(config, reader, config.given.path, False)
    monkeypatch.undo()
    write(config, records()[:5])
    assert texts.prepare(config, reader, config.given.path, False).folder != first.folder


def test_memory_is_bounded_by_the_window_whatever_the_texts(config):
    write(config, records())
    reader = training_loader(config).reader
    assert isinstance(reader.store.tokens("ids", np.int32), np.memmap)
    assert reader.meta["text_bytes"] == 4 * 8 + 8 and reader.meta["rows_per_batch"] == max(reader.batch_rows)
    assert "_maps" in reader.store.__getstate__() and not reader.store.__getstate__()["_maps"], "a worker maps the file itself"


BAD = {
    '{"sample_id": 3, "text": 5}': "line 1: the column 'text' must hold a text or a list of texts",
    '{"sample_id": 3, "words": "a"}': "the column 'text' must hold a text",
    '{"text": "a"}': "needs the column sample_id, or doc_id and position",
    '{"sample_id": "3", "text": "a"}': "sample_id is '3'; it must be a whole number",
    '{"sample_id": 3, "doc_id": 5, "text": "a"}': "sample_id 3 has doc_id 5 there and 3 in the dump: the texts are of another dump",
    '{"sample_id": 3, "text": "a", "spans": [[0, 1]]}': "must hold spans",
    "[1]": "a line must be an object",
    "{": "cannot be read as JSON lines, at or behind line",
    '{"sample_id": 4000, "text": "a"}': "none of its 1 texts is of a row of the dump",
    "": "none of its 0 texts is of a row",
}


@pytest.mark.parametrize("line", BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_line(config, line):
    with open(config.given.path, "w", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=BAD[line]) as caught:
        training_loader(config)
    assert "\n" not in str(caught.value) and config.given.path in str(caught.value)
    left = list((Path(config.pretokenize.root) / "texts").iterdir())
    assert all(p.suffix == ".lock" for p in left), "nothing half-written stays"


def test_what_is_no_file_of_texts_is_refused(config, tmp_path):
    with pytest.raises(DataError, match="there is no such file; megalens write-texts makes one"):
        training_loader(config)
    for name, message in (("a.parquet", "cannot be read as parquet"), ("a.csv", "must be a .jsonl or a .parquet file")):
        (tmp_path / name).write_text("x")
        config.given.path = str(tmp_path / name)
        with pytest.raises(DataError, match=message):
            training_loader(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"terms": {"say": 1}}, "terms.say needs given texts; set given.path"),
        ({"given": {"path": "x.jsonl"}}, "given.path needs tail_order=forward"),
        ({"given": {"path": "x.jsonl"}, "tail_order": "forward", "mix": ["a=1", "b=1"]}, "cannot be joined to a mixture"),
    ],
)
def test_settings_of_given_texts_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        validate(config_from_dict(keys))


def test_held_out_texts_are_of_the_held_out_rows(config):
    config.given.val_path = config.given.path
    write(config, [{"sample_id": n, "text": f"row {n}"} for n in (2, 5, 17)])
    batch = held_out_loader(config).rows([0, 1, 2])
    assert batch["sample_id"].tolist() == [2, 5, 17] and batch["text_length"].min() > 0


# ------------------------------------------------------------------------------------------------------------- the terms


def given(lens, rows=4, texts=SAID, weights=None):
    tokenizer, batch = lens.tokenizer, make_batch(rows=rows)
    ids = [tokenizer(texts[i % len(texts)])["input_ids"][: lens.frame.room] for i in range(rows)]
    batch["text_ids"] = torch.tensor([row + [7] * (lens.frame.room - len(row)) for row in ids])
    batch["text_length"] = torch.tensor([len(row) for row in ids])
    if weights is not None:
        batch["text_weight"] = weights
    return batch


@pytest.mark.parametrize("frame", [{}, {"end_token": "eos"}, {"end_token": "eos", "tag": "say"}])
@pytest.mark.parametrize("weighted", [False, True])
def test_say_and_read_are_the_plain_formulas_text_by_text(model, frame, weighted):  # noqa: F811
    """Each text alone: the model's own log-probabilities of tags, words and end behind the prompt; the words alone to the reconstructor."""
    lens = make_lens(model, t_text=20, **TRAINED, **frame)
    weights = torch.rand(4, lens.frame.room) * 3 if weighted else None
    batch = given(lens, weights=weights)
    out = lens(batch, at(lens))
    say, read = [], []
    for row in range(4):
        words = batch["text_ids"][row, : batch["text_length"][row]]
        end = [lens.frame.end_id] if lens.frame.end_id is not None else []
        ids = torch.tensor([*lens.frame.before, *words.tolist(), *lens.frame.behind, *end])
        weight = torch.ones(len(ids))
        if weighted:
            weight[len(lens.frame.before) :][: len(words)] = weights[row, : len(words)]
        a_1D = batch["activation"][row : row + 1]
        log_prob = lens.verbalizer.log_prob_of(a_1D, ids[None])[0]
        say.append(-(weight * log_prob).sum() / weight.sum())
        read.append(relative_mse(a_1D, lens.reconstruct(words[None], torch.tensor([len(words)]))))
    torch.testing.assert_close(out["say"], torch.stack(say).mean().detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["read"], torch.stack(read).mean().detach(), atol=1e-5, rtol=1e-5)


def test_spans_weigh_the_tokens_whose_last_character_lies_in_them(config):
    text = "the river of Arden is a river"
    write(config, [{"sample_id": 0, "text": text, "spans": [[0, 3, 0.5], [4, 12, 4.0]]}, {"sample_id": 1, "text": "it"}])
    config.t_text = 30
    store = texts.prepare(config, ShardReader(config.activation_dir("train")), config.given.path, False)
    columns, tokenizer = store.columns(0, 2), load_tokenizer(config)
    ends = np.cumsum([len(tokenizer.decode([n])) for n in tokenizer(text)["input_ids"]])
    wanted = [0.5 if end <= 3 else 4.0 if 4 < end <= 12 else 1.0 for end in ends]
    assert columns["text_weight"][0, : len(wanted)].tolist() == wanted and set(wanted) == {0.5, 4.0, 1.0}
    assert columns["text_weight"][1].tolist() == [1.0 if i < columns["text_length"][1] else 0.0 for i in range(store.meta["longest"])]


def test_a_lens_that_is_measured_leaves_out_what_has_no_texts_and_one_that_trains_refuses(model):  # noqa: F811
    lens, batch = make_lens(model, **TRAINED | {"mse_weight": 1.0}), make_batch()
    with pytest.raises(ValueError, match="a term wants given texts, and the batch has none"):
        lens(batch, at(lens))
    lens.eval()
    out = lens(batch, at(lens))
    assert "say" not in out and torch.equal(out["loss"].detach(), out["mse"])
    lens.config.mse_weight.value = 0.0
    assert lens(batch, at(lens)) == {}


# --------------------------------------------------------------------------------------------------------- they do learn


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_lens_learns_to_say_and_to_read_given_texts(model, seed):  # noqa: F811
    """Four kinds of activations and a text for each: after 50 steps it says an unseen activation's text to its end, and reads it."""
    lens = make_lens(model, t_text=8, end_token="eos", **TRAINED)
    texts, draw = ["the river", "a castle", "it", "he wrote"], torch.Generator().manual_seed(seed)
    kinds_KD = torch.randn(4, 64, generator=draw)
    batch = given(lens, rows=16, texts=texts)
    trained = [p for p in lens.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=50)
    for _ in range(50):
        batch["activation"] = kinds_KD.repeat(4, 1) + 0.3 * torch.randn(16, 64, generator=draw)
        optimizer.zero_grad()
        lens(batch, at(lens))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay.step()
    unseen = kinds_KD.repeat(4, 1) + 0.3 * torch.randn(16, 64, generator=draw)
    ids = lens.verbalize(unseen)
    lengths = lens.frame.lengths(ids).tolist()
    right = [lens.tokenizer.decode(row[:n]) == texts[i % 4] for i, (row, n) in enumerate(zip(ids.tolist(), lengths, strict=True))]
    a_hat = lens.reconstruct(batch["text_ids"], batch["text_length"])
    explained = 1 - (unseen - a_hat).square().sum() / (unseen - unseen.mean(0)).square().sum()
    assert np.mean(right) > 0.9, np.mean(right)
    assert explained > 0.6, explained
