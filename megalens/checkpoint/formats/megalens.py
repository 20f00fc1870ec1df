"""A lens in a folder of our own format: weights, what it is, and the statistics of the activations it was trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import read_json, read_tensors
from megalens.config import Config, config_from_dict, config_to_dict
from megalens.engine.state import Part
from megalens.files import save_json, save_tensors
from megalens.statistics import Statistics

FORMAT = "megalens-lens"


VERSION = 1


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
        "config": config_to_dict(config),
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
        weights |= read_tensors(path)
    return weights


def read_statistics(folder: str | Path) -> Statistics:
    """The statistics of the activations it was trained on."""
    return Statistics(**read_tensors(Path(folder) / read_about(folder)["statistics"]))


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
    from megalens.objective import build_lens

    config, statistics = read_config(folder, **changes), read_statistics(folder)
    lens = build_lens(config, statistics.mean, statistics.var)
    check_subject(folder, lens.subject.fingerprint)
    lens.load_lens_state(read_weights(folder))
    return lens.eval()


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
