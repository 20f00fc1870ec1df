"""Checkpoints: a folder that holds a lens, and what a training needs to go on from it.

::

    outputs/<run>/checkpoints/step-00000120/
        lens.safetensors     the lens' weights, float32; no engine is needed to read them
        lens.json            what the lens is: format, configuration, subject's fingerprint, versions
        stats.safetensors    mean, var and mean_normalised of the training activations
        trainer.json         where the training stands
        engine/              the optimizer's state
        checksums.json       xxh3_64 of every other file
    outputs/<run>/last, best    relative links into it

Large weights and states lie in several files, lens-00001-of-00004.safetensors and so on, each written by another rank.

A folder gets its name when everything in it is on the disk; the links are replaced at once. So a killed save leaves the old state or the
new one, and :meth:`RunFolder.tidy` removes what it left half done. Nothing that is read back is executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalens.config import Config, config_from_dict
from megalens.engine.files import checksum, point, save_json, save_tensors, sync, sync_tree
from megalens.engine.state import Part

FORMAT = "megalens-lens"
VERSION = 1
_CHECKSUMS = "checksums.json"


class CheckpointError(ValueError):
    """A checkpoint can not be used. The message is one line and names the mend."""


@dataclass(frozen=True)
class Statistics:
    """Of the activations a lens was trained on, float32 ``[D]``: per-dimension mean and variance, and the mean of the unit-length ones."""

    mean: Tensor
    var: Tensor
    mean_normalised: Tensor

    @classmethod
    def of(cls, reader) -> Statistics:
        """From whatever has the three as attributes: the training dump's reader."""
        return cls(*(torch.as_tensor(getattr(reader, field.name)).float() for field in dataclasses.fields(cls)))


# -------------------------------------------------------------------------------------------------------------- the lens


def save_lens(folder: Path, config: Config, weights: Part, statistics: Statistics, fingerprint: str) -> None:
    """Write a lens into a folder; of large weights only this rank's part.

    Args:
        weights: by the names of ``lens_state_names()``.
        fingerprint: of the subject's weights.
    """
    weights.write(folder, "lens")
    save_tensors(folder / "stats.safetensors", {f.name: getattr(statistics, f.name) for f in dataclasses.fields(Statistics)})
    about = {
        "format": FORMAT,
        "format_version": VERSION,
        "weights": "lens*.safetensors",
        "statistics": "stats.safetensors",
        "width": len(statistics.mean),
        "subject": {"model_name": config.model_name, "layer_l": config.layer_l, "fingerprint": fingerprint},
        "versions": versions(),
        "config": dataclasses.asdict(config),
    }
    save_json(folder / "lens.json", about)


def read_about(folder: str | Path) -> dict:
    """``lens.json`` of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is of another format.
    """
    path = Path(folder) / "lens.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it holds no lens.json; a run's best one is outputs/<run>/best")
    about = read_json(path)
    if (about.get("format"), about.get("format_version")) != (FORMAT, VERSION):
        found = f"{about.get('format')} version {about.get('format_version')}"
        raise CheckpointError(f"{path} is of format {found}, not {FORMAT} version {VERSION}")
    return about


def read_config(folder: str | Path, **changes: Any) -> Config:
    """The configuration a checkpoint's lens was trained with; ``changes`` replace keys, e.g. ``device="cpu"``."""
    return config_from_dict(read_about(folder)["config"] | changes)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The lens' weights, float32 on the CPU."""
    weights: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob(read_about(folder)["weights"])):
        weights |= _read_tensors(path)
    return weights


def read_statistics(folder: str | Path) -> Statistics:
    """The statistics of the activations it was trained on."""
    return Statistics(**_read_tensors(Path(folder) / read_about(folder)["statistics"]))


def check_subject(folder: str | Path, fingerprint: str) -> None:
    """Refuse a checkpoint of another subject.

    Raises:
        CheckpointError: the subject's weights are not those the lens was trained on.
    """
    subject = read_about(folder)["subject"]
    if subject["fingerprint"] != fingerprint:
        found = f"{subject['model_name']} with weights {subject['fingerprint']}"
        raise CheckpointError(f"{folder} is a lens of {found}, not of these ({fingerprint})")


def load_lens(folder: str | Path, **changes: Any):
    """The lens of a checkpoint, ready to use.

    Args:
        folder: a checkpoint, e.g. ``outputs/<run>/best``.
        changes: configuration keys that are other here: ``device``, ``dtype``, ``model_name``.

    Raises:
        CheckpointError: it is no checkpoint, it is damaged, or the subject is another one.
        ConfigError: the weights do not fit.
    """
    from megalens.lens.lens import build_lens

    config, statistics = read_config(folder, **changes), read_statistics(folder)
    lens = build_lens(config, statistics.mean, statistics.var)
    check_subject(folder, lens.subject.fingerprint)
    lens.load_lens_state(read_weights(folder))
    return lens.eval()


def first_not_finite(weights: dict[str, Tensor]) -> str | None:
    """The first weight that holds NaN or infinity."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


def versions() -> dict[str, str]:
    """Versions of what computed it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("megalens", "torch", "transformers", "peft", "safetensors", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can not be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} can not be read: it holds no JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    check_file(path)
    try:
        return load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} can not be read: {error}") from None


# ------------------------------------------------------------------------------------------------------------- checksums


def _sums(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in paths}


def check_file(path: Path) -> None:
    """Hold a file of a checkpoint against its checksum, where the checkpoint has checksums.

    Raises:
        CheckpointError: it is damaged, or not the checkpoint's.
    """
    sums = _checksums(path.parent.resolve())
    if sums is not None and path.is_file():
        _hold(path.parent.resolve(), path.name, sums)


def check_checkpoint(folder: Path, share: slice = slice(None)) -> None:
    """Hold every file, or a share of them, of a checkpoint against its checksum.

    Raises:
        CheckpointError: one is damaged, missing or not the checkpoint's.
    """
    sums = _checksums(folder)
    if sums is not None:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {_CHECKSUMS}
        for name in sorted(found | sums.keys())[share]:
            _hold(folder, name, sums)


def _checksums(folder: Path) -> dict[str, str] | None:
    path = folder / _CHECKSUMS
    if not path.is_file():
        return None
    try:
        sums = json.loads(path.read_bytes())
    except ValueError:
        sums = None
    if not isinstance(sums, dict):
        raise CheckpointError(f"{path} is damaged; {_mend(folder)}")
    return sums


def _hold(folder: Path, name: str, sums: dict[str, str]) -> None:
    path = folder / name
    if not path.is_file() or name not in sums or checksum(path) != sums[name]:
        what = "is missing" if not path.is_file() else "does not match its checksum in checksums.json: one of the two is damaged"
        raise CheckpointError(f"{path} {what}; {_mend(folder)}")


def _mend(folder: Path) -> str:
    """How to go on without a damaged checkpoint."""
    others = sorted(path.name for path in folder.parent.glob("step-*") if path.name != folder.name)
    older = f"go back to another with `ln -sfn checkpoints/{others[-1]} {folder.parent.parent / 'last'}`, " if others else ""
    return f"copy it anew from where it is whole, {older}or train anew with checkpoint.resume=false"


# ------------------------------------------------------------------------------------------------------ a run's folder


class RunFolder:
    """``outputs/<run>``: its checkpoints and the links to the last and the best one.

    Rank 0 keeps it; other ranks only add parts to an unfinished checkpoint.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        link = self.folder / "last"
        return link.resolve() if (link / "trainer.json").is_file() else None

    def tidy(self) -> None:
        """Remove what a killed save left, and set the links to what the last checkpoint knows."""
        if not self.checkpoints.is_dir():
            return
        if self.last is None:
            self._keep(set())
        else:
            progress = read_json(self.last / "trainer.json")["progress"]
            names = [[name for _, name in progress.get(key, [])] for key in ("best", "kept")]
            self._link(self.last.name, *names)

    def clear(self) -> bool:
        """Forget every checkpoint; True when there were any."""
        found = self.last is not None
        for link in ("last", "best"):
            (self.folder / link).unlink(missing_ok=True)
        if self.checkpoints.is_dir():
            self._keep(set())
        return found

    def name(self, step: int) -> str:
        """A folder name that is free for a checkpoint of this micro-step."""
        name, again = f"step-{step:08d}", 1
        while (self.checkpoints / name).exists():
            name, again = f"step-{step:08d}.{again}", again + 1
        return name

    def unfinished(self, name: str) -> Path:
        """Where a checkpoint's files are written."""
        return self.checkpoints / f".{name}.unfinished"

    def begin(self, name: str) -> Path:
        """Make that folder."""
        self.unfinished(name).mkdir(parents=True)
        return self.unfinished(name)

    def add_part(self, name: str, rank: int, paths: list[Path]) -> None:
        """For a rank that has written files of the checkpoint: they are complete."""
        folder = self.unfinished(name)
        for path in paths:
            sync(path)
        save_json(folder / f".part.{rank}.new", _sums(folder, paths))
        (folder / f".part.{rank}.new").rename(folder / f".part.{rank}")

    def finish(self, name: str, best: list[str], kept: Sequence[str] = (), ranks: int = 1) -> Path:
        """Make what was written a checkpoint, and the last one.

        Args:
            best: names of the best checkpoints, the best first.
            kept: names of those that stay for good; all others but this one are removed.
            ranks: how many write it; the parts of all but rank 0 are waited for.
        """
        folder, sums = self.unfinished(name), {}
        for part in (folder / f".part.{rank}" for rank in range(1, ranks)):
            while not part.is_file():
                time.sleep(0.05)
            sums |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        sums |= _sums(folder, (path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in sums))
        # Without a blank, so that no byte can change and mean the same.
        (folder / _CHECKSUMS).write_text(json.dumps(dict(sorted(sums.items())), separators=(",", ":")), encoding="utf-8")
        sync_tree(folder)
        folder.rename(self.checkpoints / name)
        sync(self.checkpoints)
        self._link(name, best, kept)
        return self.checkpoints / name

    def drop(self, name: str) -> None:
        """Remove what was written of a checkpoint that can not be finished."""
        shutil.rmtree(self.unfinished(name), ignore_errors=True)

    def _link(self, last: str, best: list[str], kept: Sequence[str]) -> None:
        point(self.folder / "last", self.checkpoints / last)
        if best:
            point(self.folder / "best", self.checkpoints / best[0])
        self._keep({last, *best, *kept})

    def _keep(self, names: set[str]) -> None:
        for path in self.checkpoints.iterdir():
            if path.name not in names:
                doomed = path
                if not path.name.startswith("."):  # never half a checkpoint under a good name
                    doomed = path.with_name(f".{path.name}.removed")
                    os.replace(path, doomed)
                shutil.rmtree(doomed)
