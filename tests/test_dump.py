"""The dump: which rows, that they are the subject's, that counts are exact, and that no death or crowd of ranks changes a byte."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import endure
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from megalens.config import ConfigError, config_from_dict, load_config
from megalens.data import DataError
from megalens.data.dump import check, dump
from megalens.data.loader import ActivationLoader
from megalens.data.pretokenize import load_tokens, pretokenize
from megalens.data.sampling import RowOrder, hash64
from megalens.data.shards import ShardReader, verify
from megalens.files import ChecksumFile, DiskFull
from megalens.tiny import make_model, make_text

SETTINGS = {"seq_len": 32, "min_pos": 8, "vectors_per_sequence": 3, "batch_size": 8, "rows_per_shard": 40, "rows_per_batch": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    make_model(folder / "llama")
    make_model(folder / "other", seed=1)
    make_text(folder / "text.jsonl", 100)
    pretokenize(config_from_dict(keys(folder, folder)))
    yield folder
    patch.undo()


def keys(place, root, model="llama", dataset=None, **changes) -> dict:
    settings = {
        name: changes.pop(name)
        for name in list(changes)
        if name in {*SETTINGS, "num_samples", "val_num_samples", "num_tokens", "layers", "encoding"}
    }
    return {
        "model_name": str(place / model),
        "layer_l": 2,
        "dtype": "fp32",
        "device": "cpu",
        "dataset": {"name": str(place / "text.jsonl"), **(dataset or {})},
        "pretokenize": {"root": str(place / "pretokenized"), "num_proc": 1},
        "activation_dumper": {"root": str(root / "activations"), **SETTINGS, **settings},
        **changes,
    }


@pytest.fixture
def make_config(place, tmp_path):
    return lambda **changes: config_from_dict(keys(place, tmp_path, **changes))


def read_all(config, split) -> dict[str, torch.Tensor]:
    loader = ActivationLoader(config.activation_dir(split), 1, 0)
    return loader.rows(range(loader.num_rows))


def contents(config) -> dict[str, bytes]:
    files = (path for path in sorted(config.activation_dir("train").parent.rglob("*")) if path.is_file())
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------- which rows


def order_of(lengths, ids=None, **changes) -> RowOrder:
    settings = {"seed": 0, "seq_len": 32, "min_pos": 8, "per_document": 3, "rows_per_shard": 10, **changes}
    return RowOrder(np.arange(len(lengths)) if ids is None else np.array(ids), np.array(lengths), **settings)


def all_rows(of: RowOrder) -> list[tuple[int, int]]:
    shards = [of.shard(i) for i in range(-(-of.rows // 10))]
    return [(s.source_K[d], p) for s in shards for d, p in zip(s.document_N, s.position_N, strict=True)]


def test_every_document_gives_distinct_positions_inside_it():
    lengths = [5, 8, 9, 10, 11, 12, 31, 32, 33, 500]
    rows = all_rows(order_of(lengths))
    assert len(set(rows)) == len(rows) == order_of(lengths).available
    assert all(8 <= position < min(lengths[document], 32) for document, position in rows)
    expected = {i: min(3, min(length, 32) - 8) for i, length in enumerate(lengths) if length > 8}
    assert Counter(document for document, _ in rows) == expected


@pytest.mark.parametrize("rows", [1, 9, 10, 11, 100])
def test_fewer_rows_are_a_part_of_all_rows(rows):
    lengths = np.random.default_rng(0).integers(9, 60, 50)
    chosen = all_rows(order_of(lengths, rows=rows))
    assert len(chosen) == rows
    assert set(chosen) <= set(all_rows(order_of(lengths)))


def test_positions_depend_on_the_seed_and_the_document_alone():
    lengths = np.random.default_rng(0).integers(20, 60, 30)
    ids = np.arange(30) * 7
    whole = {(ids[d], p) for d, p in all_rows(order_of(lengths, ids))}
    half = {(ids[15:][d], p) for d, p in all_rows(order_of(lengths[15:], ids[15:]))}
    assert half <= whole
    assert {(ids[d], p) for d, p in all_rows(order_of(lengths, ids, seed=1))} != whole


def test_positions_are_spread_evenly():
    counts = Counter(p for _, p in all_rows(order_of([32] * 4800, per_document=1)))
    assert len(counts) == 24
    assert all(140 < count < 260 for count in counts.values())


def test_hashes_are_those_written_in_the_format():
    assert hash64(0, 1, np.arange(3)).tolist() == [hash_by_hand(0, 1, n) for n in range(3)]
    assert hash64(2**64 + 5, 3, 2**62).tolist() == [hash_by_hand(5, 3, 2**62)]


def hash_by_hand(seed: int, *words: int) -> int:
    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for word in words:
        seed = mix(seed ^ mix((word + 0x9E3779B97F4A7C15) % 2**64))
    return seed


# ---------------------------------------------------------------------------------------------------- what is in them


def test_rows_are_the_subjects_activations_of_the_documents(make_config, place):
    config = make_config(encoding="fp32")
    dump(config)
    model = AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32)
    for split in ["train", "val"]:
        rows = read_all(config, split)
        texts = {row["doc_id"]: row["input_ids"] for row in load_tokens(config, split)}
        for i in range(0, len(rows["position"]), 7):
            position = int(rows["position"][i])
            context = texts[int(rows["doc_id"][i])][: position + 1]
            assert rows["input_ids"][i].tolist() == context + [0] * (32 - position - 1)
            with torch.no_grad():
                hidden = model(torch.tensor([context]), output_hidden_states=True).hidden_states[3]
            torch.testing.assert_close(rows["activation"][i], hidden[0, position], atol=2e-5, rtol=1e-4)


def test_a_bf16_dump_is_the_fp32_dump_rounded(make_config, tmp_path):
    exact, rounded = make_config(encoding="fp32"), make_config(activation_dumper={"root": str(tmp_path / "b"), **SETTINGS})
    dump(exact), dump(rounded)
    assert torch.equal(read_all(exact, "train")["activation"].bfloat16().float(), read_all(rounded, "train")["activation"])


def test_several_layers_in_one_pass_are_those_of_passes_of_their_own(make_config, tmp_path):
    several = make_config(layers=[3, 0, 2])
    dump(several)
    for layer in [0, 2, 3]:
        alone = make_config(layer_l=layer, activation_dumper={"root": str(tmp_path / "alone"), **SETTINGS})
        dump(alone)
        one = dataclasses.replace(several, layer_l=layer)
        assert check(one, "train") is None
        assert contents(one) == contents(alone)


def test_a_layer_that_was_lost_is_made_again_alone(make_config):
    config = make_config(layers=[1, 2])
    dump(config)
    before, kept = contents(config), dataclasses.replace(config, layer_l=1).activation_dir("train") / "meta.json"
    made = kept.stat().st_mtime_ns
    shutil.rmtree(config.activation_dir("train"))
    dump(config)
    assert contents(config) == before
    assert kept.stat().st_mtime_ns == made


def test_int8_loses_what_meta_json_says(make_config, tmp_path):
    exact = make_config(encoding="fp32")
    small = make_config(activation_dumper={"root": str(tmp_path / "b"), "encoding": "int8", **SETTINGS})
    dump(exact), dump(small)
    assert "another precision" in check(make_config(encoding="int8"), "train")
    a, b = (read_all(config, "train")["activation"] for config in (exact, small))
    meta = ShardReader(small.activation_dir("train")).meta
    lost = float(((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum())
    assert 0 < lost < 1e-3
    assert meta["fve_loss"] == pytest.approx(lost, rel=0.02)
    assert 0 < meta["fve_std_loss"] < 1e-3
    torch.testing.assert_close(torch.tensor(meta["mean"], dtype=torch.float64).float(), b.mean(0), atol=1e-5, rtol=1e-4)


def test_no_row_comes_twice_and_splits_share_no_document(make_config):
    config = make_config()
    dump(config)
    seen = {}
    for split in ["train", "val"]:
        rows = read_all(config, split)
        assert torch.equal(rows["sample_id"], torch.arange(len(rows["position"])))
        pairs = set(zip(rows["doc_id"].tolist(), rows["position"].tolist(), strict=True))
        assert len(pairs) == len(rows["position"])
        seen[split] = {document for document, _ in pairs}
    assert not seen["train"] & seen["val"]
    assert len(seen["train"] | seen["val"]) == 100


def test_rows_are_shuffled(make_config):
    config = make_config()
    dump(config)
    documents = read_all(config, "train")["doc_id"].tolist()
    assert sum(a == b for a, b in pairwise(documents)) < len(documents) / 5
    assert documents != sorted(documents)


def test_every_key_and_column_is_in_the_formats_description(make_config):
    config = make_config()
    dump(config)
    described = (Path(__file__).parents[1] / "docs/format.md").read_text()
    reader = ShardReader(config.activation_dir("train"))
    shard = pa.ipc.open_file(pa.memory_map(str(config.activation_dir("train") / "shard-00000.arrow")))
    for name in [*json.loads((config.activation_dir("train") / "meta.json").read_text()), *shard.schema.names, *reader.meta["shards"][0]]:
        assert f"`{name}`" in described, name


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("rows", [1, 39, 40, 41, 200])
def test_what_was_asked_for_is_what_lies_there(make_config, rows):
    config = make_config(num_samples=rows, val_num_samples=2)
    dump(config)
    assert [len(ShardReader(config.activation_dir(split))) for split in ["train", "val"]] == [rows, 2]
    assert check(config, "train") is None


def test_more_rows_than_the_corpus_gives_are_refused_with_their_number(make_config):
    config = make_config()
    dump(config)
    available = len(ShardReader(config.activation_dir("train")))
    with pytest.raises(DataError, match=rf"num_samples={available + 1} cannot be met: \d+ train documents give {available} rows"):
        dump(make_config(num_samples=available + 1, layer_l=1))
    with pytest.raises(DataError, match=r"give 0 rows"):
        dump(make_config(min_pos=499, seq_len=500, layer_l=1))
    assert not make_config(layer_l=1).activation_dir("train").exists()


def test_a_budget_of_tokens_is_spent_and_not_passed(make_config):
    config = make_config(num_tokens=500)
    dump(config)
    lengths = {row["doc_id"]: min(len(row["input_ids"]), 32) for row in load_tokens(config, "train")}
    read = read_all(config, "train")
    spent = sum(lengths[document] for document in set(read["doc_id"].tolist()))
    assert 500 - 32 - max(8, min(lengths.values())) < spent <= 500
    assert check(config, "train") is None
    assert "another num_tokens" in check(make_config(num_tokens=400), "train")
    assert "another num_tokens" in check(make_config(), "train")


def test_a_dump_of_all_rows_serves_who_asks_for_just_as_many(make_config):
    config = make_config()
    dump(config)
    available = len(ShardReader(config.activation_dir("train")))
    assert check(make_config(num_samples=available), "train") is None
    assert f"holds {available} rows" in check(make_config(num_samples=available - 1), "train")


# -------------------------------------------------------------------------------------------------- reuse and refusal


def test_a_dump_that_cannot_serve_says_why(make_config):
    config = make_config(num_samples=50)
    assert "there is no dump" in check(config, "train")
    dump(config)
    assert check(config, "train") is None
    cases = {
        "there is no dump": {"layer_l": 1},
        r"another seq_len \(32 there, 31 now\)": {"seq_len": 31},
        "another min_pos": {"min_pos": 9},
        "another vectors_per_sequence": {"vectors_per_sequence": 2},
        "another precision": {"encoding": "fp32"},
        r"another dataset \(min_words": {"dataset": {"min_words": 13}},
        "another seed": {"dataset": {"split_seed": 1}},
        "holds 50 rows, and num_samples asks for 60": {"num_samples": 60},
    }
    for message, changes in cases.items():
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(check(make_config(**{"num_samples": 50, **changes}), "train"))
    assert check(make_config(num_samples=50, encoding="bf16", batch_size=3, rows_per_shard=9), "train") is None


def test_a_dump_of_the_version_before_is_read_and_still_valid(checkout, monkeypatch):
    config = load_config(["config=conf/tiny.yaml"])
    folder = config.activation_dir("val")
    shutil.copytree(Path(__file__).with_name("dump_of_version_1"), folder)
    assert verify(folder) == []
    reader = ShardReader(folder)
    rows = reader.read_batch(0)
    assert rows["activation"].shape == (42, 64)
    torch.testing.assert_close(rows["activation"].float().mean(0), reader.statistics.mean.float(), atol=1e-4, rtol=1e-4)
    # Weights and tokenizers of another machine or library differ in their last bits.
    for function, key in [("subject_fingerprint", "subject"), ("tokenizer_fingerprint", "tokenizer")]:
        monkeypatch.setattr(f"megalens.data.identity.{function}", lambda *_, key=key: reader.meta[key]["fingerprint"])
    assert check(config, "val") is None
    assert "another dataset (min_words" in check(load_config(["config=conf/tiny.yaml", "dataset.min_words=13"]), "val")


def test_a_dump_of_other_weights_is_refused(make_config, place, tmp_path):
    shutil.copytree(place / "llama", tmp_path / "m/llama")
    config = make_config(model_name=str(tmp_path / "m/llama"))
    dump(config)
    shutil.copy(place / "other/model.safetensors", tmp_path / "m/llama/model.safetensors")
    assert "another subject (fingerprint" in check(config, "train")


def test_a_finished_dump_of_other_settings_is_kept_unless_forced(make_config):
    old, new = make_config(), make_config(seq_len=31)
    dump(old)
    before = contents(old)
    with pytest.raises(DataError, match=r"another seq_len.*force_redump=true"):
        dump(new)
    assert contents(old) == before
    dump(make_config(seq_len=31, force_redump=True))
    assert check(new, "train") is None
    assert verify(new.activation_dir("train")) == []


def test_a_valid_dump_is_kept_and_force_makes_the_same_anew(make_config):
    config = make_config()
    dump(config)
    meta, before = config.activation_dir("train") / "meta.json", contents(config)
    made = meta.stat().st_mtime_ns
    dump(config)
    assert meta.stat().st_mtime_ns == made
    dump(make_config(force_redump=True))
    assert meta.stat().st_mtime_ns > made
    assert contents(config) == before


@pytest.mark.parametrize("hours", [-1, 1])
def test_force_makes_a_dump_anew_once_whatever_this_machines_clock_says(make_config, monkeypatch, hours):
    config, now = make_config(), time.time
    pretokenize(config)
    dump(config)
    parts = [config.activation_dir("train") / "meta.json", config.pretokenized_dir / "meta.json"]
    made = [path.stat().st_mtime_ns for path in parts]
    monkeypatch.setattr("time.time", lambda: now() + hours * 3600)  # as beside a file server with another clock
    pretokenize(make_config(force_redump=True))
    dump(make_config(force_redump=True))
    assert all(path.stat().st_mtime_ns > before for path, before in zip(parts, made, strict=True))


def test_a_rank_that_starts_late_keeps_what_the_first_has_made_anew(make_config, monkeypatch):
    """Its launcher, like this test's parent process, is older than what any of its ranks has made."""
    config = make_config(force_redump=True)
    dump(config)
    made = (config.activation_dir("train") / "meta.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            patch.setenv(name, value)
        dump(config)
    assert (config.activation_dir("train") / "meta.json").stat().st_mtime_ns == made
    dump(config)
    assert (config.activation_dir("train") / "meta.json").stat().st_mtime_ns > made


def test_a_dump_serves_when_its_text_is_gone(make_config, place):
    config = make_config()
    dump(config)
    (place / "text.jsonl").rename(place / "away.jsonl")
    try:
        assert check(config, "train") is None
    finally:
        (place / "away.jsonl").rename(place / "text.jsonl")


def test_a_missing_text_layer_or_model_is_one_line(make_config, tmp_path):
    with pytest.raises(DataError, match=r"pretokenize\.py"):
        dump(make_config(pretokenize={"root": str(tmp_path / "none")}))
    with pytest.raises(ConfigError, match="layer_l=4"):
        dump(make_config(layer_l=4))
    with pytest.raises(ConfigError, match=r"activation_dumper.layers=\[1, 4\]: .*llama has 4 blocks, so each is 0 to 3"):
        dump(make_config(layers=[1, 4]))
    with pytest.raises(ConfigError, match=r"activation_dumper.layers=\[-1\] must not hold a negative block; the first is 0"):
        make_config(layers=[-1])
    assert not make_config().activation_dir("train").parent.parent.exists()
    with pytest.raises(ConfigError, match="does not exist"):
        dump(make_config(model_name=str(tmp_path / "none")))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # rotary and learned positions
def test_what_the_subject_cannot_read_is_refused_before_it_is_loaded(make_config, place, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("megalens.data.dump.load_to_read", lambda *_, **__: pytest.fail("the subject was loaded"))
    few, whole = str(make_model(tmp_path / "few", kind=kind, vocab_size=300)), str(make_model(tmp_path / "whole", kind=kind))
    with pytest.raises(ConfigError, match=r"the tokenizer of .*few gives ids up to 511, and .*few has 300 embeddings; fetch"):
        dump(make_config(model_name=few))
    with pytest.raises(ConfigError, match=r"gives ids up to 511, and .*few has 300 embeddings; set tokenizer_name"):
        dump(make_config(model_name=few, tokenizer_name=whole))
    with pytest.raises(ConfigError, match=r"activation_dumper.seq_len=257 is more than the window of .*whole, 256 positions"):
        dump(make_config(model_name=whole, tokenizer_name=str(place / "llama"), seq_len=257))


def test_too_small_a_disk_is_refused_before_anything_is_written(make_config, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(DataError, match=r"needs about [\d.]+ kB and 100 bytes are free"):
        dump(make_config())
    assert not make_config().activation_dir("train").exists()


def test_a_disk_that_fills_up_leaves_a_dump_that_goes_on(make_config, monkeypatch):
    config, whole = make_config(), make_config(force_redump=True)
    dump(whole)
    expected = contents(whole)
    shutil.rmtree(whole.activation_dir("train"))
    left, plain_write = [20_000], ChecksumFile.write

    def write(self, data):
        left[0] -= len(memoryview(data))
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain_write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr("megalens.files.ChecksumFile.write", write)
        with pytest.raises(DiskFull, match="no space left on the disk"):
            dump(config)
    assert list(config.activation_dir("train").glob("*.arrow"))
    assert not (config.activation_dir("train") / "meta.json").exists()
    dump(config)
    assert contents(config) == expected


# ---------------------------------------------------------------------------------------------------- ranks and deaths


@pytest.mark.parametrize(("ranks", "encoding"), [(2, "int8"), (3, "bf16_planes")])
def test_any_number_of_ranks_makes_the_same_bytes(place, tmp_path, ranks, encoding):
    changes = {"rows_per_shard": 10, "encoding": encoding, "layers": [1, 2]}
    alone, shared = (config_from_dict(keys(place, tmp_path / name, **changes)) for name in ["alone", "shared"])
    dump(alone)
    processes = endure.start(shared, ranks)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks
    assert contents(shared) == contents(alone)


def test_killing_a_dump_at_random_moments_loses_and_doubles_nothing(place, tmp_path):
    alone, killed = (config_from_dict(keys(place, tmp_path / name, **endure.SETTINGS, layers=[1, 2])) for name in ["alone", "killed"])
    dump(alone)
    counts = endure.kill_often(killed, endure.contents(alone), 6)
    assert counts["halfway"] >= 2, "too few kills came in the middle"
    assert counts["equal"] >= 1
