"""Checkpoints are whole or not there, hold a lens that needs no engine, and refuse what does not fit in one line."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from endure import flip_checkpoint_bytes
from safetensors.torch import load_file, save_file
from tiny_run import make_subject_and_dump, tiny_config

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import check_checkpoint
from megalens.checkpoint.formats.megalens import load_lens, read_statistics, read_weights, save_lens
from megalens.checkpoint.run_folder import RunFolder
from megalens.config import ConfigError
from megalens.engine.state import Part
from megalens.files import point
from megalens.objective import Step, build_lens
from megalens.statistics import Statistics
from megalens.tiny import make_model
from megalens.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_subject_and_dump(folder)
    return folder


@pytest.fixture
def saved(folder, tmp_path):
    config = tiny_config(folder)
    draw = torch.Generator().manual_seed(1)
    statistics = Statistics(torch.randn(64, generator=draw), torch.rand(64, generator=draw) + 0.5, torch.randn(64, generator=draw) / 8)
    lens = build_lens(config, statistics.mean, statistics.var)
    with torch.no_grad():
        for group in lens.parameter_groups().values():
            for parameter in group.values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    held = dict(lens.named_parameters())
    weights = {name: held[name].detach().clone() for name in lens.lens_state_names()}
    save_lens(tmp_path, config, Part(weights), statistics, lens.subject.fingerprint)
    return tmp_path, lens, statistics


def test_loaded_lens_is_the_saved_one(saved):
    folder, lens, statistics = saved
    loaded = load_lens(folder)
    a_BD = torch.randn(4, 64)
    batch = {"activation": a_BD, "input_ids": torch.arange(48).view(4, 12), "position": torch.full((4,), 9), "sample_id": torch.arange(4)}
    assert torch.equal(loaded.verbalize(a_BD), lens.eval().verbalize(a_BD))
    assert torch.equal(loaded(batch, Step.fixed(lens.config))["loss"], lens(batch, Step.fixed(lens.config))["loss"])
    assert not loaded.training
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(read_statistics(folder).mean_normalised, statistics.mean_normalised)


def test_any_flipped_byte_of_a_checkpoint_is_found_and_its_file_named(folder):
    config = tiny_config(folder, "flips", max_train_steps="2s")
    assert train(config) == 0
    counts = flip_checkpoint_bytes(config.run_dir, 40)
    assert counts.keys() == {
        "lens.safetensors",
        "lens.json",
        "stats.safetensors",
        "trainer.json",
        "engine/optimizer.safetensors",
        "checksums.json",
    }


def test_damaged_lens_is_refused_where_it_is_used(folder):
    config = tiny_config(folder, "used", max_train_steps="2s")
    assert train(config) == 0
    path = config.run_dir / "best" / "lens.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"lens.safetensors does not match its checksum.*; copy it anew"):
        load_lens(config.run_dir / "best")


def test_settings_may_be_other_ones_where_a_lens_is_used(saved):
    loaded = load_lens(saved[0], dtype="bf16", device="cpu")
    assert loaded.config.dtype == "bf16"
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters())


def test_checkpoint_of_another_subject_is_refused(saved, folder):
    make_model(folder / "other", seed=1)
    with pytest.raises(CheckpointError, match="is a lens of .*/model with weights"):
        load_lens(saved[0], model_name=str(folder / "other"))


def test_checkpoint_of_another_width_is_refused(saved, folder):
    make_model(folder / "wide", hidden_size=96)
    with pytest.raises(ConfigError, match="64 wide, .*/wide is 96 wide"):
        load_lens(saved[0], model_name=str(folder / "wide"))


def test_folder_without_a_lens_and_damaged_files_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no lens.json; a run's best one is outputs/<run>/best"):
        load_lens(tmp_path / "nothing")
    path = saved[0] / "lens.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="lens.safetensors can not be read"):
        load_lens(saved[0])
    path.write_bytes(whole)
    (saved[0] / "lens.json").write_text("{")
    with pytest.raises(CheckpointError, match="lens.json can not be read"):
        load_lens(saved[0])


def test_weights_that_do_not_fit_are_named(saved):
    path = saved[0] / "lens.safetensors"
    weights = load_file(path)
    weights["reconstructor.head.linear.bias"] = torch.zeros(3)
    save_file(weights, path)
    with pytest.raises(ConfigError, match=r"reconstructor.head.linear.bias is \(3,\) there, \(64,\) here"):
        load_lens(saved[0])


# ------------------------------------------------------------------------------------------------------ a run's folder


def write(run, step, best, kept=()):
    name = run.name(step)
    best = [name if b == "this" else b for b in best]
    progress = {"best": [[1.0, name] for name in best], "kept": [[1, name] for name in kept]}
    (run.begin(name) / "trainer.json").write_text(json.dumps({"progress": progress}))
    run.finish(name, best, kept)
    return name


def names(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_best_and_last_are_kept_and_the_links_are_relative(tmp_path):
    run = RunFolder(tmp_path / "run")
    first = write(run, 10, ["this"])
    write(run, 20, [first])
    third = write(run, 30, [first])
    assert names(run) == [first, third]
    assert os.readlink(run.folder / "last") == f"checkpoints/{third}"
    assert os.readlink(run.folder / "best") == f"checkpoints/{first}"
    assert run.last == (run.checkpoints / third).resolve()


def test_kept_ones_stay_for_good_also_where_a_run_is_tidied(tmp_path):
    run = RunFolder(tmp_path)
    first = write(run, 10, [])
    second = write(run, 20, [], kept=[first])
    assert names(run) == [first, second]
    run.tidy()
    assert names(run) == [first, second]
    third = write(run, 30, [], kept=[first])
    assert names(run) == [first, third]


def test_checkpoint_of_several_ranks_is_finished_when_every_part_is_there(tmp_path):
    run, weights = RunFolder(tmp_path), {f"w{i}": torch.full((4,), float(i)) for i in range(3)}
    folder = run.begin("step-00000010")
    (folder / "lens.json").write_text(json.dumps({"format": "megalens-lens", "format_version": 1, "weights": "lens*.safetensors"}))
    (folder / "trainer.json").write_text("{}")
    parts = [Part({name: weights[name]}, index, 3) for index, name in enumerate(weights)]
    parts[0].write(folder, "lens")
    with ThreadPoolExecutor() as pool:
        finished = pool.submit(run.finish, "step-00000010", [], (), 3)
        for rank in (2, 1):
            time.sleep(0.2)
            assert not finished.done()
            assert run.last is None
            run.add_part("step-00000010", rank, parts[rank].write(folder, "lens"))
        finished.result()
    assert {path.name for path in run.last.glob("lens-*")} == {f"lens-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    check_checkpoint(run.last)
    read = read_weights(run.last)
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    (run.last / "lens-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lens-00002-of-00003.safetensors is missing"):
        check_checkpoint(run.last)


def test_second_checkpoint_of_a_step_does_not_touch_the_first_until_it_is_whole(tmp_path):
    run = RunFolder(tmp_path)
    assert write(run, 10, ["this"]) == "step-00000010"
    assert write(run, 10, ["this"]) == "step-00000010.1"
    assert names(run) == ["step-00000010.1"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(40))
def test_save_killed_at_any_moment_leaves_the_old_or_the_new_state(tmp_path, monkeypatch, moment):
    """Every system call that a save makes through os and shutil is counted; the process dies before call number ``moment``."""
    import shutil

    run = RunFolder(tmp_path)
    old = write(run, 10, ["this"])
    calls = iter(range(1000))

    def dying(function):
        def call(*arguments, **options):
            if next(calls) == moment:
                raise Killed
            return function(*arguments, **options)

        return call

    new, died = run.name(20), False
    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "open", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        try:
            write(run, 20, ["this"])
        except Killed:
            died = True
    assert run.last is not None
    assert run.last.name in (old, new)
    fresh = RunFolder(tmp_path)
    fresh.tidy()
    last = fresh.last.name
    assert names(fresh) == [last]
    assert (tmp_path / "best").resolve().name == last
    assert died or last == new
    assert write(fresh, 20, ["this"])


def test_tidy_removes_everything_where_no_save_was_ever_finished(tmp_path):
    run = RunFolder(tmp_path)
    (run.checkpoints / ".step-00000010.unfinished").mkdir(parents=True)
    (run.checkpoints / "step-00000010").mkdir()
    run.tidy()
    assert run.last is None
    assert names(run) == []


def test_clear_forgets_all(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.clear()
    write(run, 10, ["this"])
    assert run.clear()
    assert (run.last, names(run), (tmp_path / "best").is_symlink()) == (None, [], False)


def test_link_is_replaced_at_once_and_survives_a_leftover(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    point(tmp_path / "link", tmp_path / "a")
    (tmp_path / ".link.new").symlink_to("nowhere")
    point(tmp_path / "link", tmp_path / "b")
    assert os.readlink(tmp_path / "link") == "b"


def test_full_disk_is_an_os_error_that_names_the_file_and_leaves_no_half_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    try:
        run = RunFolder(disk)
        old = write(run, 10, ["this"])
        with pytest.raises(OSError, match="No space left on device") as error:
            Part({"w": torch.zeros(1 << 16)}).write(run.begin("step-00000020"), "lens")
        assert error.value.filename.endswith("lens.safetensors")
        run.drop("step-00000020")
        assert names(run) == [old]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
