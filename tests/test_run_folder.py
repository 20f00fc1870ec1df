"""A run's checkpoints are whole or not there; nothing that a training did not make is removed, and what a copy loses is found again."""

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import check_checkpoint
from megalens.checkpoint.formats.megalens import read_weights
from megalens.checkpoint.run_folder import RunFolder
from megalens.engine.state import Part
from megalens.files import point


def write(run, step, best, kept=()):
    name = run.name(step)
    best = [name if b == "this" else b for b in best]
    progress = {"step": step, "best": [[1.0, name] for name in best], "kept": [[1, name] for name in kept]}
    folder = run.begin(name)
    (folder / "trainer.json").write_text(json.dumps({"progress": progress}))
    (folder / "lens.json").write_text("{}")
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
    about = {"format": "megalens-lens", "format_version": 2, "width": 4, "subject": {}, "config": {}}
    (folder / "lens.json").write_text(json.dumps(about))
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


def test_tidy_removes_what_saves_and_removals_left_half_done(tmp_path):
    run = RunFolder(tmp_path)
    for name in (".step-00000010.unfinished", ".step-00000010.1.removed"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.tidy() is None
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
