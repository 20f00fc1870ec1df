"""A checkpoint of any content is read or refused in a line; whatever lies in a run's folder, only a training's own is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fuzzed import as_json, damaged, fuzzed, mutated, near, outcome, tree, values, words
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_run import make_subject_and_dump, tiny_config

from megalens.checkpoint.checksums import check_checkpoint, sums_of, write_sums
from megalens.checkpoint.formats import load_lens, read_config
from megalens.checkpoint.formats.megalens import read_optimizer, read_standard, read_statistics, read_weights
from megalens.checkpoint.run_folder import RunFolder
from megalens.config import Checkpoint, Config, config_to_dict
from megalens.data.loader import ActivationLoader
from megalens.families.loading import subject_fingerprint
from megalens.train import train
from megalens.training.progress import clock_of, is_finished
from megalens.training.start import find_start, identity, open_folder

STEP = "step-00000004"


class Place:
    """A trained run of 8 micro-steps, saved at 4 and 8, and what a resume compares with."""

    def __init__(self, folder: Path):
        make_subject_and_dump(folder)
        self.folder = folder
        self.config = tiny_config(folder, "original", max_train_steps="8s", checkpoint=Checkpoint(save_interval="4s", keep_every="4s"))
        assert train(self.config) == 0
        self.loader = ActivationLoader(self.config.activation_dir("train"), self.config.batch_size, self.config.seed)
        self.same = identity(self.config, subject_fingerprint(self.config), self.loader.identity)
        run = self.config.run_dir / "checkpoints" / "step-00000008"
        self.names = load_lens(run, device="cpu").lens.lens_state_names()
        self.about, self.state = (json.loads((run / name).read_text()) for name in ("lens.json", "trainer.json"))

    def copy(self) -> RunFolder:
        """A fresh copy of the run; its last checkpoint is of step 8."""
        shutil.rmtree(self.folder / "outputs" / "copy", ignore_errors=True)
        shutil.copytree(self.config.run_dir, self.folder / "outputs" / "copy", symlinks=True)
        return RunFolder(self.folder / "outputs" / "copy")

    def resume(self, config: Config):
        """What a training of the copy finds before it loads a model."""
        folder = open_folder(config, 0)
        start = find_start(config, folder, self.loader, self.same)
        is_finished(start.progress, clock_of(config, self.loader.steps_per_epoch))
        return start

    def config_of_copy(self) -> Config:
        return tiny_config(self.folder, "copy", max_train_steps="12s", checkpoint=Checkpoint(save_interval="4s", keep_every="4s"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("trained"))


def put(checkpoint: Path, name: str, data: bytes, sums: str) -> None:
    """Write a file of a checkpoint; its checksums are then ``old``, ``new`` or ``gone``."""
    (checkpoint / name).write_bytes(data)
    if sums == "gone":
        (checkpoint / "checksums.json").unlink()
    elif sums == "new":
        listed = json.loads((checkpoint / "checksums.json").read_text())
        write_sums(checkpoint, sums_of(checkpoint, [checkpoint / each for each in listed if (checkpoint / each).is_file()]))


def read_all(checkpoint: Path, names: list[str]) -> None:
    """Read every part of a checkpoint."""
    read_config(checkpoint)
    read_weights(checkpoint)
    read_statistics(checkpoint)
    read_standard(checkpoint)
    optimizer = read_optimizer(checkpoint, names)
    for name in names:
        optimizer.moments(name)


sums = st.sampled_from(["old", "new", "new", "gone", "gone"])


@st.composite
def changed_settings(draw, about: dict) -> dict:
    """``lens.json`` with some settings of its configuration changed."""
    config = dict(about["config"])
    for key in draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = draw(st.one_of(values, near(config[key]), mutated(config[key]) if isinstance(config[key], dict) else values))
    return about | {"config": config}


@fuzzed(40)
@given(st.data(), sums)
def test_a_lens_json_of_any_content_is_read_or_refused(place, data, kept):
    run = place.copy()
    checkpoint = run.last
    about = data.draw(st.one_of(mutated(place.about), changed_settings(place.about), values))
    content = data.draw(st.one_of(st.just(as_json(about)), damaged(as_json(about))))
    put(checkpoint, "lens.json", content, kept)
    before = tree(run.folder)
    outcome(lambda: read_all(checkpoint, place.names))
    loaded, refused = outcome(lambda: load_lens(checkpoint, device="cpu"))
    if refused is None:
        assert config_to_dict(loaded.lens.config)["trust_remote_code"] is False
    assert tree(run.folder) == before


@pytest.mark.parametrize("change", [{"subject": None}, {"subject": {"model_name": "x"}}, {"versions": []}, {"config": 1}, {"width": "64"}])
def test_a_lens_json_with_an_entry_of_another_kind_is_refused(place, change):
    run = place.copy()
    put(run.last, "lens.json", as_json(place.about | change), "gone")
    assert f"holds no '{next(iter(change))}" in outcome(lambda: load_lens(run.last, device="cpu"))[1]


@fuzzed(60)
@given(st.data(), sums)
def test_a_trainer_json_of_any_content_is_gone_on_from_or_refused(place, data, kept):
    run = place.copy()
    state = data.draw(st.one_of(mutated(place.state), mutated(place.state), values))
    if data.draw(st.booleans()) and isinstance(state, dict):
        state = place.state | {"progress": data.draw(mutated(place.state["progress"]))}
    content = data.draw(st.one_of(st.just(as_json(state)), damaged(as_json(state))))
    put(run.last, "trainer.json", content, kept)
    before = tree(run.folder, but=("best",))
    start, refused = outcome(lambda: place.resume(place.config_of_copy()))
    if refused is None:
        assert 0 <= start.progress.step < 2**63
    else:
        assert tree(run.folder, but=("best",)) == before, "what is refused stays as it is, but for a link"


@fuzzed(40)
@given(st.data(), st.sampled_from(["old", "old", "gone", "new"]))
def test_a_damaged_file_is_told_or_does_not_matter(place, data, kept):
    run = place.copy()
    checkpoint = run.last
    files = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from([name for name in files if kept == "old" or name != "checksums.json"]))
    content = (checkpoint / name).read_bytes()
    bad = data.draw(damaged(content))
    put(checkpoint, name, bad, kept)
    before = tree(run.folder)
    _, found = outcome(lambda: check_checkpoint(checkpoint))
    assert kept != "old" or bad == content or found is not None, "every change is found"
    outcome(lambda: read_all(checkpoint, place.names))
    _, refused = outcome(lambda: place.resume(place.config_of_copy()))
    assert refused is None or tree(run.folder) == before


FOREIGN = [".DS_Store", "notes.txt", "step-1", "step-00000099", "step-00000004-copy", ".step-x.removed", "paper", "last.bak", ".last.new"]
actions = st.lists(
    st.tuples(
        st.sampled_from(["file", "folder", "link to a folder", "dangling link", "link to a file"]),
        st.one_of(st.sampled_from(FOREIGN), words.filter(lambda name: name.isprintable() and "/" not in name and 0 < len(name) < 60)),
        st.sampled_from(["", "checkpoints", f"checkpoints/{STEP}", f"checkpoints/{STEP}/engine", "checkpoints/step-00000008"]),
    ),
    max_size=5,
)
losses = st.sets(
    st.sampled_from(
        ["last", "best", f"checkpoints/{STEP}/lens.json", "checkpoints/step-00000008/trainer.json", "checkpoints/step-00000008"]
    )
)


@fuzzed(40)
@given(actions, losses, st.booleans(), st.sampled_from(["links", "followed", "last dangles"]))
@example([], {"last"}, True, "links")
@example([("file", "paper", "checkpoints/step-00000008")], {"checkpoints/step-00000008/trainer.json"}, True, "last dangles")
def test_in_a_runs_folder_only_what_a_training_made_is_touched(place, put_there, lost, resume, links):
    run = place.copy()
    if links == "followed":
        shutil.rmtree(run.folder)
        shutil.copytree(place.config.run_dir, run.folder, symlinks=False)
    elif links == "last dangles":
        (run.folder / "last").unlink()
        (run.folder / "last").symlink_to("checkpoints/nope")
    for name in sorted(lost):
        path = run.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
    foreign = [path for kind, name, where in put_there if (path := add(kind, run.folder / where / name)) is not None]
    theirs = {str(path): shown(path) for path in foreign}
    whole = {path.name for path in run.checkpoints.iterdir() if is_whole(path)}
    config = place.config_of_copy()
    config.checkpoint.resume = resume
    _, refused = outcome(lambda: place.resume(config))
    assert {str(path): shown(path) for path in foreign if kept(path, run, resume)} == {
        path: state for path, state in theirs.items() if kept(Path(path), run, resume)
    }
    if refused is not None:
        assert whole <= {path.name for path in run.checkpoints.iterdir()} or not resume
        return
    if resume:
        assert whole & {STEP, "step-00000008"} <= {path.name for path in run.checkpoints.iterdir()}


def kept(path: Path, run: RunFolder, resume: bool) -> bool:
    """What lies inside a checkpoint goes with it when it is removed on purpose."""
    inside = path.relative_to(run.folder).parts
    return resume or len(inside) < 3 or not inside[1].startswith("step-0000000")


def is_whole(path: Path) -> bool:
    return not path.is_symlink() and all((path / name).is_file() for name in ("lens.json", "trainer.json", "checksums.json"))


def add(kind: str, path: Path) -> Path | None:
    """Put something there, where nothing is."""
    if os.path.lexists(path) or not path.parent.is_dir() or path.name in ("last", "best", ".last.new", ".best.new"):
        return None
    if kind == "file":
        path.write_text("theirs")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.md").write_text("theirs")
    else:
        path.symlink_to({"link to a folder": "/tmp", "dangling link": "nowhere", "link to a file": "/etc/hostname"}[kind])
    return path


def shown(path: Path) -> str:
    """What lies there, or where a damaged checkpoint was set aside with it."""
    if not os.path.lexists(path):
        path = Path(str(path).replace("/step-00000008/", "/step-00000008.damaged/").replace(f"/{STEP}/", f"/{STEP}.damaged/"))
    if path.is_symlink():
        return os.readlink(path)
    return path.read_text() if path.is_file() else "folder " + (path / "thesis.md").read_text() if path.is_dir() else "gone"
