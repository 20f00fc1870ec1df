"""The shard format: what is written comes back, from any number of writers, and damage is named."""

from __future__ import annotations

import errno
import json
import shutil

import endure
import numpy as np
import pyarrow as pa
import pytest
import torch
from dumps import D, header, make_dump, make_rows

from megalens.commands.verify import main as verify_command
from megalens.config import ConfigError
from megalens.data import DataError
from megalens.data.moments import Moments
from megalens.data.shards import ShardReader, ShardWriter, discard, read_meta, verify
from megalens.files import DiskFull


def read_all(folder) -> dict[str, torch.Tensor]:
    reader = ShardReader(folder)
    parts = [reader.read_batch(i) for i in range(len(reader.batch_rows))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("encoding", ["bf16", "bf16_planes", "fp32"])
@pytest.mark.parametrize("count", [1, 16, 100, 101, 250])
def test_rows_come_back_as_written(tmp_path, encoding, count):
    rows = make_dump(tmp_path, count, encoding=encoding)
    back = read_all(tmp_path)
    assert back["activation"].dtype == (torch.float32 if encoding == "fp32" else torch.bfloat16)
    assert torch.equal(back["activation"].float(), rows["activation"].float())
    for name in ["input_ids", "position", "doc_id"]:
        assert torch.equal(back[name].long(), rows[name])
    assert torch.equal(back["sample_id"], torch.arange(count))
    assert len(ShardReader(tmp_path)) == count
    assert verify(tmp_path) == []


def test_every_bf16_value_survives_the_planes(tmp_path):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()].reshape(-1, 128)
    rows = {**make_rows(len(values), 128), "activation": values}
    writer = ShardWriter(tmp_path, header(len(values), d=128, rows_per_shard=1000))
    writer.begin()
    writer.write(0, rows)
    assert writer.finish()
    assert torch.equal(read_all(tmp_path)["activation"].view(torch.int16), values.view(torch.int16))


def test_large_token_ids_survive_int32(tmp_path):
    rows = make_rows(5)
    rows["input_ids"] = rows["input_ids"] * 500
    writer = ShardWriter(tmp_path, header(5, token_type="int32"))
    writer.begin()
    writer.write(0, rows)
    writer.finish()
    assert torch.equal(read_all(tmp_path)["input_ids"].long(), rows["input_ids"])


def test_statistics_are_those_of_the_stored_rows(tmp_path):
    rows = make_dump(tmp_path)
    reader, a = ShardReader(tmp_path), rows["activation"].double()
    torch.testing.assert_close(reader.statistics.mean, a.mean(0).float())
    torch.testing.assert_close(reader.statistics.var, a.var(0, correction=0).float())
    torch.testing.assert_close(reader.statistics.mean_normalised, (a / a.norm(dim=1, keepdim=True)).mean(0).float())


def test_statistics_merge_to_those_of_the_union():
    a = make_rows(300)["activation"]
    whole, merged = Moments.of(a), Moments.of(a[:7]) + Moments.of(a[7:200]) + Moments.of(a[200:])
    assert merged.count == whole.count
    np.testing.assert_array_equal(merged.total_D, whole.total_D)
    merged, whole = merged.statistics().to_meta(), whole.statistics().to_meta()
    assert list(merged) == ["mean", "variance", "mean_normalised"]
    for name in merged:
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-12)


def test_plain_pyarrow_reads_the_planes_back_in_two_lines(tmp_path):
    rows = make_dump(tmp_path, 100)
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard-00000.arrow"))).read_all()
    high, low = (table[f"activation_{part}"].combine_chunks().flatten().to_numpy().astype(np.uint32) for part in ["high", "low"])
    assert np.array_equal((high << 24 | low << 16).view(np.float32).reshape(-1, D), rows["activation"].float().numpy())
    assert table["input_ids"].to_pylist()[3] == rows["input_ids"][3, : rows["position"][3] + 1].tolist()
    assert table.schema.field("activation_high").metadata == {b"encoding": b"bf16_planes"}


def test_any_order_and_number_of_writers_gives_the_same_bytes(tmp_path):
    rows = make_dump(tmp_path / "one")
    writers = [ShardWriter(tmp_path / "two", header(250)) for _ in range(2)]
    for writer in writers:
        writer.begin()
    for index, writer in [(2, writers[0]), (0, writers[1]), (1, writers[0])]:
        assert not writer.finish()
        part = writer.shard_rows(index)
        writer.write(index, {name: value[part.start : part.stop] for name, value in rows.items()})
    assert writers[1].finish()
    assert writers[0].finish()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_claimed_shard_is_not_given_twice_and_comes_free_with_its_holder(tmp_path):
    first, second = ShardWriter(tmp_path, header(250)), ShardWriter(tmp_path, header(250))
    first.begin(), second.begin()
    lock = first.claim(0)
    assert lock is not None
    assert second.claim(0) is None
    lock.release()
    assert second.claim(0) is not None


def test_a_written_shard_is_not_claimed_again(tmp_path):
    rows = make_rows(100)
    writer = ShardWriter(tmp_path, header(100))
    writer.begin()
    writer.write(0, rows)
    assert writer.claim(0) is None


def test_an_unfinished_dump_with_other_settings_is_discarded(tmp_path):
    old = ShardWriter(tmp_path, header(250))
    old.begin()
    old.write(0, make_rows(100))
    assert ShardWriter(tmp_path, header(250)).begin() is None
    assert old.is_written(0)
    assert "other settings" in ShardWriter(tmp_path, header(250, layer=3)).begin()
    assert not old.is_written(0)
    assert not list(tmp_path.glob("*.arrow"))


def test_an_unfinished_dump_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"there is no dump in .*dump_acts\.py"):
        ShardReader(tmp_path / "nowhere")
    ShardWriter(tmp_path, header(250)).begin()
    with pytest.raises(DataError, match="not finished"):
        ShardReader(tmp_path)


def test_discard_spares_what_is_newer_than_the_command(tmp_path):
    make_dump(tmp_path)
    made = (tmp_path / "meta.json").stat().st_mtime
    discard(tmp_path, older_than=made - 1)
    assert verify(tmp_path) == []
    discard(tmp_path, older_than=made + 1)
    assert not list(tmp_path.glob("*.arrow"))
    assert not (tmp_path / "meta.json").exists()


def test_activations_that_are_not_finite_are_refused(tmp_path):
    rows = make_rows(100)
    rows["activation"][5, 3] = float("inf")
    writer = ShardWriter(tmp_path, header(100))
    writer.begin()
    with pytest.raises(DataError, match="NaN or infinity"):
        writer.write(0, rows)
    assert not list(tmp_path.glob("*.arrow"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("encoding", ["bf16_planes", "int8"])
def test_any_flipped_byte_is_detected(tmp_path, encoding):
    make_dump(tmp_path, encoding=encoding)
    assert sum(endure.flip_bytes(tmp_path, 80).values()) == 80


def test_other_damage_is_named(tmp_path):
    make_dump(tmp_path)
    shard = tmp_path / "shard-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    assert "cut short" in verify(tmp_path)[0]
    shard.unlink()
    assert "is missing" in verify(tmp_path)[0]
    with pytest.raises(DataError, match=r"shard-00001.arrow is missing; .*force_redump=true"):
        read_all(tmp_path)
    make_dump(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "shard-00001.arrow", shard)
    assert "shard-00001.arrow" in verify(tmp_path)[0]
    shard.write_bytes(whole)
    shutil.copy(shard, tmp_path / "shard-00009.arrow")
    assert "belongs to no shard" in verify(tmp_path)[0]


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megalens.data.shards.writer.VERSION", 99)
    make_dump(tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataError, match="version 99"):
        read_meta(tmp_path)


def test_an_undamaged_shard_reads_beside_a_damaged_one(tmp_path):
    rows = make_dump(tmp_path)
    (tmp_path / "shard-00001.arrow").write_bytes(b"nothing")
    assert torch.equal(ShardReader(tmp_path).read_batch(0)["activation"], rows["activation"][:16])


def test_another_subject_tokenizer_layer_or_width_is_refused(tmp_path):
    make_dump(tmp_path)
    reader = ShardReader(tmp_path)
    right = {"subject": {"name": "renamed", "fingerprint": "s"}, "tokenizer": {"name": "toy", "fingerprint": "t"}, "layer": 2, "d": D}
    reader.check_matches(right)
    other = {"name": "toy", "fingerprint": "x"}
    for key, value in {"subject": other, "tokenizer": other, "layer": 3, "d": D + 1}.items():
        with pytest.raises(DataError, match=rf"is of another {key} .*force_redump=true"):
            reader.check_matches({**right, key: value})


def test_more_shards_than_stay_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megalens.data.shards.reader._OPEN_SHARDS", 2)
    rows = make_dump(tmp_path, 250, rows_per_shard=20)
    assert torch.equal(read_all(tmp_path)["activation"], rows["activation"])


def test_a_column_is_read_alone(tmp_path):
    rows = make_dump(tmp_path)
    assert np.array_equal(ShardReader(tmp_path).column("doc_id"), rows["doc_id"].numpy())


def test_a_full_disk_leaves_nothing_under_a_final_name(tmp_path, monkeypatch):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(tmp_path, header(100))
    writer.begin()
    monkeypatch.setattr("megalens.files.ChecksumFile.write", write)
    with pytest.raises(DiskFull, match="no space left"):
        writer.write(0, make_rows(100))
    assert not list(tmp_path.glob("*.arrow"))
    assert not list(tmp_path.glob(".work/*.tmp"))


def test_meta_json_is_plain_json(tmp_path):
    make_dump(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert [shard["rows"] for shard in meta["shards"]] == [100, 100, 50]
    assert len(meta["mean"]) == len(meta["variance"]) == D
    assert list(meta)[-1] == "checksum"


def test_the_command_prints_what_is_wrong_and_exits_with_1(tmp_path, capsys):
    make_dump(tmp_path / "good"), make_dump(tmp_path / "bad")
    (tmp_path / "bad/shard-00001.arrow").unlink()
    assert verify_command([str(tmp_path / name) for name in ["good", "bad", "none"]]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "WRONG", "WRONG"]
    assert "250 rows in 3 shards" in lines[0]
    assert "shard-00001.arrow is missing" in lines[1]
    assert verify_command([str(tmp_path / "good")]) == 0
    assert verify_command(["--all", str(tmp_path)]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "WRONG", "ok"]
    with pytest.raises(ConfigError, match="name the folders"):
        verify_command([])
    with pytest.raises(DataError, match="no dump below"):
        verify_command(["--all", str(tmp_path / "none")])
