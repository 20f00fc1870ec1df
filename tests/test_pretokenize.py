"""Tokenizing once: special tokens in text stay text, and what is there and valid is reused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import quick
import zstandard

from megalens.config import ConfigError, config_from_dict
from megalens.data import DataError
from megalens.data.corpus import load_documents
from megalens.data.pretokenize import encode, load_tokens, pretokenize, why_stale
from megalens.families.loading import load_tokenizer
from megalens.tiny import BOS, EOS, make_model, make_text

ROW = b'{"text": "one line of text that is long enough to count, about a river and its banks"}\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "llama")
    make_model(folder / "gemma2", "gemma2")
    make_text(folder / "text.jsonl", 60)
    return folder


@pytest.fixture
def make_config(place, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(kind="llama", dataset=None, **keys):
        return config_from_dict(
            {
                "model_name": str(place / kind),
                "layer_l": 2,
                "dataset": {"name": str(place / "text.jsonl"), **(dataset or {})},
                "pretokenize": {"root": str(tmp_path / "pretokenized"), "num_proc": 1},
                **keys,
            }
        )

    return make


def test_both_splits_hold_every_document_whole(make_config):
    config = make_config()
    assert pretokenize(config) == config.pretokenized_dir
    tokenizer, documents = load_tokenizer(config), load_documents(config)
    for split in ["train", "val"]:
        tokens = load_tokens(config, split)
        assert tokens["doc_id"][:] == documents[split]["doc_id"][:]
        assert tokenizer.batch_decode(tokens["input_ids"][:]) == documents[split]["text"][:]
    meta = json.loads((config.pretokenized_dir / "meta.json").read_text())
    assert meta["splits"]["train"]["documents"] + meta["splits"]["val"]["documents"] == 60
    assert meta["splits"]["val"]["tokens"] == sum(len(ids) for ids in load_tokens(config, "val")["input_ids"])
    assert not list(config.pretokenized_dir.rglob("*.cache"))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_special_tokens_in_text_are_text(make_config, kind):
    tokenizer = load_tokenizer(make_config(kind))
    text = f"before {EOS} between {BOS}{BOS} after"
    ids = encode(tokenizer, [text])[0]
    own = ids[1:] if kind == "gemma2" else ids
    assert not set(own) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(own) == text


def test_a_bos_comes_first_where_the_tokenizer_adds_one(make_config):
    for kind, start in [("llama", []), ("gemma2", [1])]:
        tokenizer = load_tokenizer(make_config(kind))
        assert encode(tokenizer, ["a river", ""]) == [start + tokenizer.encode("a river", add_special_tokens=False), start]


def test_an_end_token_is_not_put_behind_the_text(make_config):
    from tokenizers import processors

    tokenizer = load_tokenizer(make_config())
    template = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 0)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("a river")["input_ids"][-1] == 0
    assert encode(tokenizer, ["a river"])[0] == tokenizer("a river")["input_ids"][:-1]


def test_a_valid_one_is_reused_and_force_makes_it_anew(make_config):
    config = make_config()
    assert "no pretokenized corpus" in why_stale(config)
    made = (pretokenize(config) / "meta.json").stat().st_mtime_ns
    assert why_stale(config) is None
    assert (pretokenize(config) / "meta.json").stat().st_mtime_ns == made
    assert (pretokenize(make_config(force_redump=True)) / "meta.json").stat().st_mtime_ns > made


def test_other_settings_are_named_and_replace_nothing_unless_forced(make_config, place, tmp_path):
    made = pretokenize(make_config()) / "meta.json"
    before, other = made.read_bytes(), {"split_seed": 7}
    assert "another dataset (split_seed: 42 there, 7 now)" in why_stale(make_config(dataset=other))
    make_text(place / "text.jsonl", 61)
    try:
        assert "another dataset (source" in why_stale(make_config())
        with pytest.raises(DataError, match=r"another dataset \(source.*name another pretokenize\.root, or .*force_redump=true"):
            pretokenize(make_config())
    finally:
        make_text(place / "text.jsonl", 60)
    namesake = tmp_path / "llama"
    shutil.copytree(place / "gemma2", namesake)
    assert "another tokenizer (fingerprint" in why_stale(make_config(model_name=str(namesake)))
    assert made.read_bytes() == before
    pretokenize(make_config(dataset=other, force_redump=True))
    assert why_stale(make_config(dataset=other)) is None


def test_a_corpus_of_the_same_file_name_takes_nothing_from_the_first(make_config, tmp_path):
    for number, folder in enumerate(("d1", "d2")):
        (tmp_path / folder).mkdir()
        make_text(tmp_path / folder / "corpus.jsonl", 60 + number)
    first, second = (make_config(dataset={"name": str(tmp_path / folder / "corpus.jsonl")}) for folder in ("d1", "d2"))
    made = {path: path.read_bytes() for path in pretokenize(first).rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=r"another dataset \(source: .* there, .* now\); name another pretokenize\.root, or"):
        pretokenize(second)
    assert why_stale(first) is None
    assert all(path.read_bytes() == content for path, content in made.items())


def test_two_models_on_one_corpus_in_turn_make_their_tokens_once(make_config):
    folders = [pretokenize(make_config(kind)) for kind in ("llama", "gemma2")]
    assert folders[0].parent == folders[1].parent
    made = [path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*"))]
    for kind in ("llama", "gemma2", "llama", "gemma2"):
        assert why_stale(make_config(kind)) is None
        pretokenize(make_config(kind))
        assert load_tokens(make_config(kind), "val")
    assert [path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*"))] == made


def test_tokens_of_an_earlier_version_are_left_where_they_are_and_told(make_config):
    config = make_config()
    pretokenize(config)
    earlier = config.pretokenized_dir.parent
    for path in list(config.pretokenized_dir.iterdir()):
        path.rename(earlier / path.name)
    assert f"(the one in {earlier} itself is of an earlier version; it is left alone" in why_stale(config)
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    pretokenize(config)
    assert why_stale(config) is None
    assert {path: path.read_bytes() for path in before} == before


def test_damage_is_found(make_config):
    config = make_config()
    arrow = next((pretokenize(config) / "train").glob("*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-1])
    assert "cut short" in why_stale(config)
    arrow.write_bytes(whole[:-2000] + b"x" + whole[-1999:])
    with pytest.raises(DataError, match=r"damaged.*pretokenize\.py.*force_redump=true"):
        load_tokens(config, "train")
    (config.pretokenized_dir / "meta.json").write_text("{")
    assert "damaged" in why_stale(config)
    pretokenize(config)
    assert why_stale(config) is None


def test_an_unusable_corpus_leaves_nothing(make_config):
    config = make_config(dataset={"min_words": 10**6})
    with pytest.raises(DataError, match="no usable document"):
        pretokenize(config)
    assert not [path for path in config.pretokenized_dir.parent.iterdir() if path.is_dir()]


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_made(make_config, tmp_path, place):
    config = make_config()
    model = shutil.copytree(config.model_name, tmp_path / "small")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"vocab_size": 300}))
    config = dataclasses.replace(config, model_name=str(model))
    with pytest.raises(ConfigError, match=r"gives ids up to \d+, and .*small has 300 embeddings"):
        pretokenize(config)
    assert [path for path in Path(config.pretokenize.root).rglob("*") if path.is_file() and not path.name.endswith(".lock")] == []


def test_many_processes_give_the_same_tokens(make_config, place, tmp_path):
    make_text(place / "long.jsonl", 1200)
    dataset = {"name": str(place / "long.jsonl")}
    alone = make_config(dataset=dataset, pretokenize={"root": str(tmp_path / "alone"), "num_proc": 1})
    many = make_config(dataset=dataset, pretokenize={"root": str(tmp_path / "many"), "num_proc": 2})
    pretokenize(alone), pretokenize(many)
    for split in ["train", "val"]:
        assert load_tokens(alone, split)[:] == load_tokens(many, split)[:]


def test_ranks_that_start_together_make_it_once(make_config):
    config = make_config()
    ranks = [quick.context().Process(target=pretokenize, args=(config,)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert why_stale(config) is None


@pytest.mark.parametrize("kind", ["jsonl.zst", "txt.zst", "jsonl"])
def test_a_stream_gives_the_same_tokens_and_leaves_no_text_on_the_disk(tmp_path, tiny_data, monkeypatch, kind):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [json.loads(line)["text"] for line in (tiny_data / "corpus" / "tiny.jsonl").read_text().splitlines()]
    texts = [" ".join(text.split()) for text in texts]
    lines = [f"{text}\n" if kind == "txt.zst" else json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stream = tmp_path / f"stream.{kind}"
    with zstandard.open(stream, "wt") if kind.endswith("zst") else stream.open("w") as file:
        file.writelines(lines)
    found, cached = [], []
    for source, streaming in [(tmp_path / "plain.jsonl", False), (stream, kind == "jsonl")]:
        config = config_from_dict(
            {
                "model_name": str(tiny_data / "models" / "tiny-llama"),
                "dataset": {"name": str(source), "max_documents": 150},
                "pretokenize": {"root": str(tmp_path / "tokens"), "num_proc": 1, "streaming": streaming},
            }
        )
        assert config.dataset_label == source.name.split(".")[0]
        pretokenize(config)
        assert why_stale(config) is None
        found.append({split: load_tokens(config, split).to_list() for split in ("train", "val")})
        cached.append(sorted((tmp_path / "cache").rglob("*.arrow")))
    assert found[0] == found[1]
    assert cached[0] == cached[1] != []
    assert found[0]["val"]
    assert not [path for path in (tmp_path / "tokens" / "stream").rglob("*") if "stream" in path.name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("one.jsonl", ROW, "has no usable (train|val) document"),
        ("cut.jsonl", ROW + b'{"text": "a', "cannot read"),
        ("empty.jsonl", b"", "is empty: it holds no documents"),
        ("empty.txt", b"\n\n \n", "is empty: it holds no documents"),
        ("cut.jsonl.zst", zstandard.compress(ROW * 100)[:-20], "it is cut short; copy it anew"),
        ("cut.txt.zst", zstandard.compress(ROW * 100)[:30], "it is cut short; copy it anew"),
        ("no.parquet", b"PAR1", "cannot read"),
        ("bad.jsonl.zst", b"no zstd at all", "cannot read"),
        ("column.jsonl", b'{"body": "a"}\n', "has no column 'text'"),
        ("latin1.jsonl", ROW + ROW.replace(b"river", b"caf\xe9"), "it is not UTF-8"),
    ],
)
def test_an_unusable_stream_is_one_line_that_names_it(make_config, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    settings = {"root": str(tmp_path / "pretokenized"), "num_proc": 1, "streaming": not name.endswith(".zst")}
    config = make_config(dataset={"name": str(tmp_path / name)}, pretokenize=settings)
    with pytest.raises(DataError, match=message) as error:
        pretokenize(config)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not [path for path in config.pretokenized_dir.parent.iterdir() if path.is_dir()]
