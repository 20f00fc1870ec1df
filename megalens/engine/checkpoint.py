"""Checkpoints: a folder that holds a lens, and what a training needs to go on from it.

::

    outputs/<run>/checkpoints/step-00000120/
        lens.safetensors     the lens' weights, float32; no engine is needed to read them
        lens.json            what the lens is: format, configuration, subject's fingerprint, versions
        stats.safetensors    mean, var and mean_normalised of the training activations
        trainer.json         where the training stands
        engine/              the optimizer's state
    outputs/<run>/last, best    relative links into it

A folder gets its name when everything in it is on the disk; the links are replaced at once. So a killed save leaves the old state or the
new one, and :meth:`RunFolder.tidy` removes what it left half done. Nothing that is read back is executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalens.config import Config, config_from_dict
from megalens.engine.files import point, save_json, save_tensors, sync, sync_tree

FORMAT = "megalens-lens"
VERSION = 1


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


def save_lens(folder: Path, config: Config, weights: dict[str, Tensor], statistics: Statistics, fingerprint: str) -> None:
    """Write a lens into a folder.

    Args:
        weights: by the names of ``lens_state_names()``.
        fingerprint: of the subject's weights.
    """
    save_tensors(folder / "lens.safetensors", weights)
    save_tensors(folder / "stats.safetensors", {f.name: getattr(statistics, f.name) for f in dataclasses.fields(Statistics)})
    about = {
        "format": FORMAT,
        "format_version": VERSION,
        "weights": "lens.safetensors",
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
    return _read_tensors(Path(folder) / read_about(folder)["weights"])


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
        CheckpointError: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can not be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} can not be read: it holds no JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} can not be read: {error}") from None


# ------------------------------------------------------------------------------------------------------ a run's folder


class RunFolder:
    """``outputs/<run>``: its checkpoints and the links to the last and the best one.

    Written by one process; any may read.
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
            best = [name for _, name in read_json(self.last / "trainer.json")["progress"]["best"]]
            self._link(self.last.name, best)

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

    def write(self, name: str, fill: Callable[[Path], None], best: list[str]) -> Path:
        """Add a checkpoint and make it the last one.

        Args:
            fill: writes the checkpoint's files into the folder it is given.
            best: names of the best checkpoints, the best first; all others but this one are removed.
        """
        unfinished = self.checkpoints / f".{name}.unfinished"
        unfinished.mkdir(parents=True)
        try:
            fill(unfinished)
            sync_tree(unfinished)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(self.checkpoints / name)
        sync(self.checkpoints)
        self._link(name, best)
        return self.checkpoints / name

    def _link(self, last: str, best: list[str]) -> None:
        point(self.folder / "last", self.checkpoints / last)
        if best:
            point(self.folder / "best", self.checkpoints / best[0])
        self._keep({last, *best})

    def _keep(self, names: set[str]) -> None:
        for path in self.checkpoints.iterdir():
            if path.name not in names:
                doomed = path
                if not path.name.startswith("."):  # never half a checkpoint under a good name
                    doomed = path.with_name(f".{path.name}.removed")
                    os.replace(path, doomed)
                shutil.rmtree(doomed)
