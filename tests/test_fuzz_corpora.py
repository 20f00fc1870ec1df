"""A corpus of any bytes gives documents, the same ones read whole and as a stream, or is refused in a line; its files stay as they are."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from fuzzed import damaged, fuzzed, outcome, tree, values, words
from hypothesis import given
from hypothesis import strategies as st

from megalens.config import config_from_dict
from megalens.data.corpus import load_documents, stream_documents

SENTENCE = "This document number {} is long enough to count, as it has more than twelve words."
ENCODINGS = ["utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16", "cp1252", "utf-32"]
texts = st.one_of(
    st.integers(0, 9).map(SENTENCE.format),
    st.integers(0, 9).map(SENTENCE.format),
    st.lists(words, min_size=1, max_size=3).map(lambda some: " ".join([SENTENCE, *some])),
    st.integers(0, 9).map(lambda number: SENTENCE.format(number).replace(" long", "\nlong")),
    words,
)
cells = st.one_of(texts, texts, texts, values)
columns = st.sampled_from(["text", "text", "text", "content", "", "id"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of its own, with the cache of ``datasets`` beside the corpus."""
    folder = tmp_path_factory.mktemp("corpora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("datasets.builder.config.HF_DATASETS_CACHE", folder / "cache")
        patch.chdir(folder)
        yield folder


@st.composite
def text_files(draw) -> tuple[str, bytes]:
    blanks = st.sampled_from(["\n", "\n", "\n\n", "\n \t\n", "\r\n", "\r\n\r\n", "\r", "\x0b", "\u2028", "\n\n\n", "\0"])
    parts = draw(st.lists(st.tuples(texts, blanks), max_size=8))
    return ".txt", _encoded(draw, "".join(text + blank for text, blank in parts))


@st.composite
def json_files(draw) -> tuple[str, bytes]:
    rows = draw(st.lists(st.one_of(st.dictionaries(columns, cells, max_size=2), st.builds(lambda text: {"text": text}, texts)), max_size=8))
    rows += draw(st.sampled_from([[], [], [1], [[]], [None], [{"text": [SENTENCE]}], [{"text": {"a": SENTENCE}}]]))
    form = draw(st.sampled_from(["lines", "lines", "array", "object", "value"]))
    whole = {"array": rows, "object": {"data": rows}, "value": draw(values)}.get(form)
    text = "\n".join(map(json.dumps, rows)) if form == "lines" else json.dumps(whole, indent=draw(st.sampled_from([None, 1])))
    if draw(st.booleans()):
        text = text.encode().decode("unicode_escape", errors="ignore") if draw(st.booleans()) else text.replace("\n", "\r\n")
    return draw(st.sampled_from([".json", ".jsonl"])), _encoded(draw, text)


def _encoded(draw, text: str) -> bytes:
    return text.encode(draw(st.sampled_from(ENCODINGS)), errors="replace")


@st.composite
def parquet_files(draw) -> tuple[str, bytes]:
    count = draw(st.integers(0, 8))
    some = draw(st.lists(texts, min_size=count, max_size=count))
    kinds = [
        lambda: pa.array(some, pa.string()),
        lambda: pa.array(some, pa.large_string()),
        lambda: pa.array([None if i % 2 else text for i, text in enumerate(some)], pa.string()),
        lambda: pa.array(some).dictionary_encode(),
        lambda: pa.array([text.encode() for text in some], pa.binary()),
        lambda: pa.array([[text] for text in some]),
        lambda: pa.array([{"a": text} for text in some]),
        lambda: pa.array(range(count)),
        lambda: pa.nulls(count),
    ]
    some = [text.encode(errors="replace").decode() for text in some]
    table = {draw(columns): draw(st.sampled_from(kinds))() for _ in range(draw(st.integers(0, 2)))}
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table(table), sink)
    return ".parquet", sink.getvalue().to_pybytes()


@st.composite
def files(draw) -> tuple[str, bytes]:
    """A name's end and the bytes of a file."""
    suffix, data = draw(st.one_of(text_files(), json_files(), json_files(), parquet_files()))
    if draw(st.integers(0, 4)) == 0:
        data = draw(damaged(data))
    if draw(st.integers(0, 5)) == 0:
        suffix, data = suffix + ".zst", zstandard.compress(data)
        data = draw(damaged(data)) if draw(st.booleans()) else data
    return suffix, data


names = st.sampled_from(["a", "b", "[c]", "d*", "é ü", ".e", "f.g", "sub/h", ".hidden/i", "-k"])


@fuzzed(30)
@given(
    st.lists(st.tuples(names, files()), min_size=1, max_size=2),
    st.fixed_dictionaries(
        {},
        optional={
            "text_column": st.sampled_from(["text", "content", "", "nope"]),
            "min_words": st.sampled_from([0, 1, 12, 10**6]),
            "max_documents": st.sampled_from([1, 3, 10**9]),
            "val_fraction": st.sampled_from([0.01, 0.5, 0.99]),
        },
    ),
)
def test_a_corpus_is_read_alike_whole_and_as_a_stream_or_refused(place, some, settings):
    corpus = place / "corpus"
    shutil.rmtree(corpus, ignore_errors=True)
    for name, (suffix, data) in some:
        path = corpus / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    before = tree(corpus)
    dataset = {"name": "corpus" if len(some) > 1 else str(path.relative_to(place)), **settings}
    config, refused = outcome(lambda: config_from_dict({"dataset": dataset, "pretokenize": {"num_proc": 1}}))
    if refused is None:
        whole, why = outcome(
            lambda: {split: dict(zip(rows["doc_id"], rows["text"], strict=True)) for split, rows in load_documents(config).items()}
        )
        streamed, why_streamed = outcome(lambda: {split: dict(stream_documents(config, split)) for split in ("train", "val")})
        for said in filter(None, (why, why_streamed)):
            assert "corpus" in said or "dataset." in said, said
        if why is None:
            assert why_streamed is None, why_streamed
            assert whole["train"].keys() | whole["val"].keys() == streamed["train"].keys() | streamed["val"].keys()
            assert whole["train"] | whole["val"] == streamed["train"] | streamed["val"]
            if streamed["train"] and streamed["val"]:
                assert whole == streamed
        elif why_streamed is None:
            assert "single usable document" in why or not (streamed["train"] or streamed["val"]), why
    assert tree(corpus) == before
    shutil.rmtree(place / "cache", ignore_errors=True)
