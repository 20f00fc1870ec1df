"""A run's checkpoints are whole or not there; nothing that a training did not make is removed, and what a copy loses is found again."""

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_run import make_subject_and_dump, tiny_config

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import check_checkpoint
from megalens.checkpoint.formats.megalens import read_weights
from megalens.checkpoint.run_folder import RunFolder
from megalens.config import Checkpoint
from megalens.engine.state import Part
from megalens.files import point
from megalens.train import train


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
    about = {
        "format": "megalens-lens",
        "format_version": 2,
        "width": 4,
        "subject": {"model_name": "m", "layer_l": 1, "fingerprint": "f"},
        "config": {},
    }
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
    assert {last} <= set(names(fresh)) <= {old, new}
    assert (tmp_path / "best").resolve().name == last
    assert died or last == new
    newest = write(fresh, 20, ["this"])
    assert names(fresh) == [newest], "the next save removes what this one did not come to remove"


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


# --------------------------------------------------------------------------- what others put there, and what a copy loses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 8 micro-steps whose checkpoints at 4 and 8 are both kept; copy it."""
    folder = tmp_path_factory.mktemp("trained")
    make_subject_and_dump(folder)
    assert train(config_of(folder, "original", "8s")) == 0
    return folder


def config_of(folder, run_name, length):
    config = tiny_config(folder, run_name, max_train_steps=length, checkpoint=Checkpoint(save_interval="4s", keep_every="4s"))
    config.gumbel_tau_schedule.num_steps = "16s"
    return config


def copy(trained, name):
    """A copy of the run, links as links, and the configuration that trains it 4 micro-steps longer."""
    shutil.copytree(trained / "outputs" / "original", trained / "outputs" / name, symlinks=True)
    return config_of(trained, name, "12s")


def listing(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_others_put_beside_the_checkpoints_stays_and_stops_nothing(trained):
    config = copy(trained, "foreign")
    checkpoints = config.run_dir / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "paper-figure-3")
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000004-copy")
    (checkpoints / "my_notes").mkdir()
    (checkpoints / "my_notes" / "thesis.md").write_text("x")
    for name in (".DS_Store", "notes.txt", ".notes.txt.removed", "step-00000099"):
        (checkpoints / name).write_text("x")
    (checkpoints / "link").symlink_to(trained / "model")
    (checkpoints / "step-00000098").symlink_to(trained / "model")
    (checkpoints / "step-00000097").symlink_to("nowhere")
    theirs = {path.name for path in checkpoints.iterdir()} - {"step-00000004", "step-00000008"}
    before = {name: listing(checkpoints / name) for name in theirs}
    assert train(config) == 0
    assert {path.name for path in checkpoints.iterdir()} == theirs | {"step-00000004", "step-00000008", "step-00000012"}
    assert {name: listing(checkpoints / name) for name in theirs} == before
    config.checkpoint.resume = False
    assert train(config) == 0
    assert theirs <= {path.name for path in checkpoints.iterdir()}


def test_file_that_comes_while_a_checkpoint_is_written_stops_nothing_and_is_no_part_of_it(tmp_path):
    run = RunFolder(tmp_path)
    write(run, 10, [])
    folder = run.begin("step-00000020")
    for name in (".DS_Store", "._lens.json", "notes.txt"):
        (folder / name).write_text("x")
        (run.checkpoints / name).write_text("x")
    (folder / "trainer.json").write_text("{}")
    run.finish("step-00000020", [])
    assert json.loads((run.last / "checksums.json").read_text()).keys() == {"trainer.json"}
    assert names(run) == [".DS_Store", "._lens.json", "notes.txt", "step-00000020"]


@pytest.mark.parametrize("inside", ["", "engine"])
def test_foreign_file_in_a_checkpoint_is_no_damage_and_is_not_read(trained, inside):
    config = copy(trained, f"inside-{inside}")
    folder = config.run_dir / "checkpoints" / "step-00000008" / inside
    for name in (".DS_Store", "notes.txt", "lens-old.safetensors", "optimizer-old.safetensors", "lens.safetensors.bak"):
        (folder / name).write_text("x")
    assert train(config) == 0
    assert (config.run_dir / "last").resolve().name == "step-00000012"


def test_removal_that_is_held_up_does_not_stop_a_save(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    write(run, 10, [])
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
        write(run, 20, [])
    assert names(run) == [".step-00000010.removed", "step-00000020"]
    write(run, 30, [])
    assert names(run) == ["step-00000030"]


@pytest.mark.parametrize("last", ["missing", "dangling"])
def test_lost_last_is_found_again_and_nothing_is_removed(trained, capsys, last):
    config = copy(trained, f"lost-{last}")
    for link in ("last", "best"):
        (config.run_dir / link).unlink()
    if last == "dangling":
        (config.run_dir / "last").symlink_to("checkpoints/nope")
    assert train(config) == 0
    told = capsys.readouterr().err
    assert f"{config.run_dir} has no link `last`: going on from its newest whole checkpoint, step-00000008" in told
    assert f"from step-00000008 of {config.run_dir}" in told
    assert {path.name for path in (config.run_dir / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in (4, 8, 12)}
    assert os.readlink(config.run_dir / "best").startswith("checkpoints/step-")


def test_lost_last_with_a_damaged_newest_goes_on_from_the_one_before_and_keeps_the_damaged_one(trained, capsys):
    config = copy(trained, "lost-and-damaged")
    (config.run_dir / "last").unlink()
    newest = config.run_dir / "checkpoints" / "step-00000008"
    damage(newest / "lens.safetensors")
    before = {path.name: content for path, content in listing(newest).items()}
    assert train(config) == 0
    assert "checkpoint, step-00000004; step-00000008 is set aside as damaged: " in capsys.readouterr().err
    aside = config.run_dir / "checkpoints" / "step-00000008.damaged"
    assert {path.name: content for path, content in listing(aside).items()} == before


def test_lost_last_without_a_whole_checkpoint_is_refused_and_nothing_is_removed(trained):
    config = copy(trained, "nothing-whole")
    (config.run_dir / "last").unlink()
    for path in (config.run_dir / "checkpoints").iterdir():
        (path / "lens.json").unlink()
    before = listing(config.run_dir / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"no link `last`, and none of its checkpoints is whole: .*step-00000008/lens.json is missing;"
    ):
        train(config)
    assert listing(config.run_dir / "checkpoints") == before
    config.checkpoint.resume = False
    assert train(config) == 0


def test_last_that_leads_out_of_the_run_is_refused_and_nothing_is_removed(trained):
    config = copy(trained, "astray")
    target = trained / "elsewhere" / "step-00000016"
    shutil.copytree(config.run_dir / "checkpoints" / "step-00000004", target)
    point(config.run_dir / "last", target)
    before = listing(config.run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match=r"astray/last leads to .*elsewhere/step-00000016, which is none of the run's checkpoints"):
        train(config)
    assert listing(config.run_dir / "checkpoints") == before


@pytest.mark.parametrize("resume", [True, False])
def test_links_that_a_copy_made_folders_are_told_and_the_mend_works(trained, resume):
    config = config_of(trained, f"followed it's {resume}", "12s")
    shutil.copytree(trained / "outputs" / "original", config.run_dir, symlinks=False)
    config.checkpoint.resume = resume
    with pytest.raises(CheckpointError, match=r"last and .*/best are no link into checkpoints/, .*; mend it with `") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not (config.run_dir / ".last.new").exists()
    subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
    assert train(config) == 0
    assert (config.run_dir / "last").resolve().name == "step-00000012"


def test_folder_of_someone_else_where_the_link_goes_is_moved_aside(tmp_path):
    run = RunFolder(tmp_path)
    write(run, 10, ["this"])
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "picture.png").write_text("x")
    with pytest.raises(CheckpointError, match="best is no link") as error:
        run.tidy()
    subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
    run.tidy()
    assert (tmp_path / "best.moved" / "picture.png").is_file()
    assert (tmp_path / "best").resolve().name == "step-00000010"


def test_memory_setting_may_change_where_a_run_goes_on(trained):
    config = copy(trained, "less-memory")
    config.verbalizer.checkpoint_every_n_tokens = 1
    assert train(config) == 0
    assert (config.run_dir / "last").resolve().name == "step-00000012"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda saved: saved.pop("progress"), "does not tell where the training stands"),
        (lambda saved: saved.pop("identity"), "holds no progress or identity"),
        (lambda saved: saved["progress"].update(weather=1), "holds 'weather', which this version of megalens does not know"),
    ],
)
def test_trainer_state_of_another_shape_is_refused_in_a_line(trained, change, told, request):
    config = copy(trained, f"state-{request.node.callspec.id}")
    path = config.run_dir / "checkpoints" / "step-00000008" / "trainer.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    (path.parent / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=told):
        train(config)


def test_key_that_an_older_version_did_not_save_is_held_against_its_default(trained):
    config = copy(trained, "older")
    path = config.run_dir / "checkpoints" / "step-00000008" / "trainer.json"
    saved = json.loads(path.read_text())
    del saved["identity"]["verbalizer.inject"]
    path.write_text(json.dumps(saved))
    (path.parent / "checksums.json").unlink()
    config.verbalizer.inject = "embedding"
    with pytest.raises(CheckpointError, match=r"was begun with verbalizer.inject=block \(now embedding\)"):
        train(config)
    config.verbalizer.inject = "block"
    assert train(config) == 0
