"""A dump of any content is read as it says, or refused in a line that names what is wrong; reading changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from dumps import make_dump
from fuzzed import as_json, damaged, fuzzed, mutated, near, outcome, tree, values, words
from hypothesis import given
from hypothesis import strategies as st

from megalens.data.inspect import inspect
from megalens.data.loader import ActivationLoader
from megalens.data.shards import ShardReader, verify
from megalens.data.shards.meta import render_meta
from megalens.files import checksum

ROWS = 40
SHARD = "shard-00000.arrow"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two small dumps, one of them with a scale."""
    folder = tmp_path_factory.mktemp("dumps")
    for encoding in ("bf16_planes", "int8"):
        make_dump(folder / encoding, ROWS, encoding=encoding, rows_per_shard=24, rows_per_batch=8)
    return folder


def copy(place: Path, encoding: str) -> Path:
    shutil.rmtree(place / "copy", ignore_errors=True)
    return shutil.copytree(place / encoding, place / "copy")


def read_all(folder: Path) -> int:
    """Every row of a dump, by each way of reading; how many there are."""
    reader = ShardReader(folder)
    parts = [reader.read_batch(index) for index in range(len(reader.batch_rows))]
    count = sum(len(part["position"]) for part in parts)
    assert all(part["activation"].shape == (len(part["position"]), reader.meta["d"]) for part in parts)
    assert all(part["input_ids"].shape == (len(part["position"]), reader.meta["seq_len"]) for part in parts)
    assert len(reader.column("doc_id")) == count == len(reader)
    loader = ActivationLoader(folder, 4, 0)
    assert len(next(loader.batches())["position"]) == 4
    assert len(loader.rows([0, count - 1])["position"]) == 2
    inspect(folder, 0, 100, [])
    return count


encodings = st.sampled_from(["bf16_planes", "int8"])


@st.composite
def metas(draw, meta: dict) -> dict:
    """``meta.json`` with some of its keys changed."""
    if draw(st.booleans()):
        return draw(mutated(meta))
    found = dict(meta)
    for key in draw(st.lists(st.sampled_from(sorted(meta)), min_size=1, max_size=2)):
        found[key] = draw(st.one_of(values, near(meta[key]), mutated(meta[key]) if isinstance(meta[key], dict | list) else values))
    return found


@fuzzed(80)
@given(st.data(), encodings)
def test_a_meta_json_of_any_content_is_read_or_refused(place, data, encoding):
    folder = copy(place, encoding)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksum"]
    changed = data.draw(st.one_of(metas(meta), metas(meta), values))
    sealed = isinstance(changed, dict) and data.draw(st.integers(0, 4)) > 0
    (folder / "meta.json").write_bytes(render_meta(changed).encode() if sealed else as_json(changed))
    before = tree(folder)
    outcome(lambda: read_all(folder))
    outcome(lambda: verify(folder))
    assert tree(folder) == before


@fuzzed(50)
@given(st.data(), encodings, st.sampled_from(["meta.json", SHARD, SHARD]))
def test_damaged_bytes_are_told_with_the_files_name(place, data, encoding, name):
    folder = copy(place, encoding)
    content = (folder / name).read_bytes()
    bad = data.draw(damaged(content))
    (folder / name).write_bytes(bad)
    before = tree(folder)
    count, refused = outcome(lambda: read_all(folder))
    problems = verify(folder)
    if bad == content:
        assert (count, problems) == (ROWS, [])
    else:
        assert name in refused
        assert any(name in problem for problem in problems)
    assert tree(folder) == before


def sealed_shard(folder: Path, table: pa.Table, rows_per_batch: int, compression: str | None = "zstd") -> None:
    """Put a shard of another writer into a dump, with its size and checksum in ``meta.json``."""
    with pa.ipc.new_file(str(folder / SHARD), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, rows_per_batch)
    seal(folder)


def seal(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksum"]
    meta["shards"][0] |= {"bytes": (folder / SHARD).stat().st_size, "checksum": checksum(folder / SHARD)}
    (folder / "meta.json").write_text(render_meta(meta))


@st.composite
def other_tables(draw, table: pa.Table) -> pa.Table:
    """A shard's rows as another writer might have them."""
    name = draw(st.sampled_from(table.column_names))
    index = table.column_names.index(name)
    kind = draw(st.sampled_from(["drop", "nulls", "type", "slice", "values", "rename", "double", "more"]))
    if kind == "drop":
        return table.drop_columns([name])
    if kind == "nulls":
        return table.set_column(index, name, pa.nulls(len(table), table.schema.field(name).type))
    if kind == "type":
        other = draw(st.sampled_from([pa.array(range(len(table)), pa.int64()), pa.array(["x"] * len(table)), pa.array([[1]] * len(table))]))
        return table.set_column(index, name, other)
    if kind == "slice":
        return table.slice(draw(st.integers(0, len(table) - 1)), draw(st.integers(0, len(table))))
    if kind == "rename":
        return table.rename_columns([draw(words) if each == name else each for each in table.column_names])
    if kind == "double":
        return pa.concat_tables([table, table])
    if kind == "more":
        return table.append_column("more", pa.array(range(len(table))))
    whole = draw(st.lists(st.sampled_from([-1, 0, 5, 11, 12, 10**6, 2**31 - 1]), min_size=len(table), max_size=len(table)))
    field = draw(st.sampled_from(["position", "doc_id", "sample_id", "layer"]))
    return table.set_column(table.column_names.index(field), table.schema.field(field), pa.array(whole, table.schema.field(field).type))


@fuzzed(50)
@given(st.data(), encodings)
def test_a_shard_of_another_writer_is_read_or_refused(place, data, encoding):
    folder = copy(place, encoding)
    table = pa.ipc.open_file(pa.OSFile(str(folder / SHARD))).read_all()
    sealed_shard(folder, data.draw(other_tables(table)), data.draw(st.sampled_from([8, 8, 8, 5, 100])))
    outcome(lambda: read_all(folder))
