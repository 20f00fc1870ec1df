"""Text from every source, cleaned, and divided by document."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from megalens.config import config_from_dict
from megalens.data import DataError
from megalens.data.compressed import is_whole
from megalens.data.corpus import load_documents, stream_documents
from megalens.data.local_files import source_fingerprint

TEXTS = [f"Document {i} is long enough to count, for it has more than twelve words." for i in range(40)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.builder.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def load(name, **keys):
    return load_documents(config_from_dict({"dataset": {"name": str(name), **keys}}))


def documents(name, **keys) -> dict[int, str]:
    found = load(name, **keys)
    return {row["doc_id"]: row["text"] for split in found.values() for row in split}


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text, "other": 1}) + "\n" for text in texts))
    return path


def test_every_kind_of_local_file_gives_the_same_documents(tmp_path):
    expected = dict(enumerate(TEXTS))
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    (tmp_path / "paragraphs.txt").write_text("\n\n".join(TEXTS))
    pa.parquet.write_table(pa.table({"title": TEXTS, "text": TEXTS}), tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", TEXTS[:10])
    write_jsonl(folder / "2.jsonl", TEXTS[10:])
    for name in ["a.json", "lines.txt", "paragraphs.txt", "a.parquet", "folder", write_jsonl(tmp_path / "a.jsonl", TEXTS)]:
        assert documents(name) == expected, name


def test_a_paragraph_keeps_its_lines(tmp_path):
    wrapped = [text.replace(" for", "\nfor") for text in TEXTS]
    (tmp_path / "a.txt").write_text("\n\n".join(wrapped))
    assert documents("a.txt") == dict(enumerate(wrapped))


BLANK = "\n \t\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\n \n".join(TEXTS), TEXTS),
        ("".join(text + ("\n\n" if i % 2 else BLANK) for i, text in enumerate(TEXTS)), TEXTS),
        ("\n".join(TEXTS) + "\n\n", TEXTS),
        (BLANK + "\n".join(TEXTS), TEXTS),
        ("\n\n\n".join(TEXTS), TEXTS),
        ("\r\n\r\n".join(TEXTS), TEXTS),
        ("\ufeff" + "\n".join(TEXTS), TEXTS),
    ],
    ids=["blanks", "mixed", "at the end", "at the start", "two", "crlf", "bom"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_of_white_space_is_a_blank_line_and_one_at_an_end_parts_nothing(tmp_path, content, expected, streaming):
    (tmp_path / "a.txt").write_bytes(content.encode())
    if streaming:
        config = config_from_dict({"dataset": {"name": "a.txt"}})
        found = dict(row for split in ("train", "val") for row in stream_documents(config, split))
    else:
        found = documents("a.txt")
    assert found == dict(enumerate(expected))


def test_a_name_is_a_name_and_no_pattern(tmp_path):
    for name in ["part*.jsonl", "data [en].jsonl", "what?.jsonl", "run[1]/x.jsonl"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, TEXTS)
    write_jsonl(tmp_path / "part2.jsonl", TEXTS * 2)
    for name in ["part*.jsonl", "data [en].jsonl", "what?.jsonl", "run[1]", "run[1]/x.jsonl"]:
        assert documents(name) == dict(enumerate(TEXTS)), name
    write_jsonl(tmp_path / "a::b.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"a::b\.jsonl cannot be read, as '::' .*; rename it"):
        load("a::b.jsonl")


def test_hidden_files_and_folders_are_left_out(tmp_path):
    folder = tmp_path / "folder"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS)
    write_jsonl(folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl", TEXTS)
    (folder / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    assert documents("folder") == dict(enumerate(TEXTS))
    config = config_from_dict({"dataset": {"name": "folder"}})
    before = source_fingerprint(config)
    write_jsonl(folder / ".ipynb_checkpoints" / "b-checkpoint.jsonl", TEXTS)
    assert source_fingerprint(config) == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_bytes_that_are_not_utf8_are_one_line(tmp_path, name):
    latin1 = [text.replace("long", "caf\xe9").encode("latin-1") for text in TEXTS]
    if name == "a.parquet":
        column = pa.array(latin1, pa.binary())
        column = pa.Array.from_buffers(pa.string(), len(column), column.buffers())
        pa.parquet.write_table(pa.table({"text": column}), tmp_path / name)
    else:
        rows = latin1 if name == "a.txt" else [b'{"text": "' + text + b'"}' for text in latin1]
        (tmp_path / name).write_bytes(b"\n".join(rows))
    with pytest.raises(DataError, match=r"cannot read .*it is not UTF-8 \(.*0xe9\); convert it") as error:
        load(name)
    assert "\n" not in str(error.value)


def test_the_packaged_corpus_is_found_where_it_is_made(tmp_path):
    with pytest.raises(DataError, match=r"prepare_demo\.py"):
        load("wiki-leads")
    (tmp_path / "data/corpus").mkdir(parents=True)
    pa.parquet.write_table(pa.table({"title": TEXTS, "topic": TEXTS, "gloss": TEXTS, "text": TEXTS}), "data/corpus/wiki-leads.parquet")
    assert documents("wiki-leads") == dict(enumerate(TEXTS))


def test_short_and_ambiguous_documents_are_dropped_and_ids_stay(tmp_path):
    texts = ["too short", *TEXTS[:3], TEXTS[0] + " It may refer to many things.", None, *TEXTS[3:9]]
    write_jsonl(tmp_path / "a.jsonl", texts)
    assert sorted(documents("a.jsonl")) == [1, 2, 3, *range(6, 12)]
    assert documents("a.jsonl")[7] == TEXTS[4]
    assert sorted(documents("a.jsonl", max_documents=3)) == [1, 2]


def test_the_division_is_by_text_and_steady(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 2)
    found = load("a.jsonl", val_fraction=0.3)
    train, val = (set(found[split]["text"]) for split in ["train", "val"])
    assert not train & val
    assert 4 <= len(val) <= 20
    assert train | val == set(TEXTS)
    assert set(load("a.jsonl", val_fraction=0.3)["val"]["text"]) == val
    assert set(load("a.jsonl", val_fraction=0.3, max_documents=20)["val"]["text"]) <= val
    assert set(load("a.jsonl", val_fraction=0.3, split_seed=1)["val"]["text"]) != val


def test_both_sides_have_a_document_however_small_the_fraction(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    for fraction in [1e-9, 1 - 1e-9]:
        assert {name: len(split) for name, split in load("a.jsonl", val_fraction=fraction).items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "few words"}\n', r"a\.jsonl has no usable document in column 'text'.*min_words"),
        ("a.jsonl", '{"body": "few words"}\n', r"no column 'text'; set dataset.text_column to one of: body"),
        ("a.jsonl", '{"text": 5}\n', r"holds values of type int, not text"),
        ("a.jsonl", '[\n {\n"text": "a"\n},\n 1\n]', r"cannot read a\.jsonl: "),
        ("a.jsonl", "", r"a\.jsonl is empty: it holds no documents"),
        ("a.jsonl", '{"text": \n', r"cannot read .*a\.jsonl"),
        ("a.txt", "", r"a\.txt is empty: it holds no documents"),
        ("a.txt", "\n\n", r"a\.txt is empty: it holds no documents"),
        ("a.parquet", "no parquet", r"cannot read .*a\.parquet"),
        ("a.csv", "x,y", r"holds no file that can be read"),
        ("a.jsonl", json.dumps({"text": TEXTS[0]}), r"single usable document"),
    ],
)
def test_an_unusable_corpus_is_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_table_without_rows_is_empty(tmp_path):
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is empty: it holds no documents"):
        load("a.parquet")


@pytest.mark.parametrize("content", [b"", b"short", b"a" * 500_000, bytes(range(256)) * 999])
def test_a_compressed_file_is_whole_at_its_frames_ends_alone(tmp_path, content):
    frames = [zstandard.ZstdCompressor(write_checksum=check).compress(content) for check in (True, False)]
    whole = b"".join(frames)
    ends = {len(frames[0]), len(whole)}
    for cut in {*range(1, 40), *range(len(whole) - 40, len(whole) + 1), *ends}:
        if 0 < cut <= len(whole):
            (tmp_path / "a.zst").write_bytes(whole[:cut])
            assert is_whole(tmp_path / "a.zst") == (cut in ends), cut


def test_a_missing_file_and_a_mixed_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        load("gone.jsonl")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.txt").write_text(TEXTS[0])
    write_jsonl(tmp_path / "mixed/b.jsonl", TEXTS)
    with pytest.raises(DataError, match="several kinds"):
        load("mixed")


def test_a_dataset_of_the_hub_is_loaded_by_name_and_split(monkeypatch):
    def load_dataset(name, config_name, split, streaming):
        assert (name, config_name) == ("SimpleStories/SimpleStories", "default")
        return datasets.Dataset.from_dict({"story": TEXTS[:30] if split == "train" else TEXTS[30:]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = load("SimpleStories/SimpleStories", config_name="default", text_column="story", val_split="test")
    assert {name: len(split) for name, split in found.items()} == {"train": 30, "val": 10}


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"cannot read a/b: Couldn't reach 'a/b' on the Hub"):
        load("a/b")


def test_the_fingerprint_follows_the_content(tmp_path):
    config = config_from_dict({"dataset": {"name": str(write_jsonl(tmp_path / "a.jsonl", TEXTS))}})
    first = source_fingerprint(config)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert source_fingerprint(config) == first
    write_jsonl(tmp_path / "a.jsonl", TEXTS[1:])
    assert source_fingerprint(config) != first
