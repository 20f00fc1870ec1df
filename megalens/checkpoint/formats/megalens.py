"""Our own format: a folder with the lens' weights, what it is, and the statistics of the activations it was trained on.

``lens.safetensors``, ``lens.json`` and ``stats.safetensors`` of the layout in :mod:`megalens.checkpoint`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import read_json, read_tensors, sums_of, write_sums
from megalens.checkpoint.formats import megalens_v1
from megalens.checkpoint.formats.format import LoadedLens
from megalens.config import Config, config_from_dict, config_to_dict
from megalens.config.reading import kind_of
from megalens.engine import shard_frozen, shards_weights
from megalens.engine.state import OptimizerState, Part, copied, part_files
from megalens.families.loading import commit_of, subject_fingerprint
from megalens.files import save_json, save_tensors
from megalens.lens.names import stable_names
from megalens.statistics import ActivationStatistics

FORMAT = "megalens-lens"
VERSION = 2
_NOT_TAKEN = ("trust_remote_code", "engine", "deepspeed", "fsdp")
_STANDARD = ("standard_mean", "standard_var")
_KINDS: dict[str, type] = {"width": int, "subject": dict, "config": dict, "versions": dict}  # of lens.json's entries
_SUBJECT: dict[str, type] = {"model_name": str, "layer_l": int, "fingerprint": str}


class Megalens:
    """The format that trainings write."""

    name = "megalens"
    looked_for = "lens.json"

    def detect(self, folder: Path) -> bool:
        """Does it hold a ``lens.json``?"""
        return (folder / self.looked_for).is_file()

    def read_config(self, folder: Path, arguments: Sequence[str] = (), **changes: Any) -> Config:
        """See :class:`megalens.checkpoint.formats.format.Format`."""
        return read_config(folder, arguments, **changes)

    def load(self, folder: Path, **changes: Any) -> LoadedLens:
        """See :class:`megalens.checkpoint.formats.format.Format`."""
        from megalens.objective import build_lens

        config, statistics = read_config(folder, **changes), read_statistics(folder)
        check_subject(folder, subject_fingerprint(config))
        lens = build_lens(config, *read_standard(folder), empty_blocks=shards_weights(config), to_train=False)
        weights = lens.load_lens_state(read_weights(folder))
        if shards_weights(config):
            lens.ranks = shard_frozen(config, lens, weights)
            lens.subject.check(lens.ranks.device)
        return LoadedLens(lens.eval(), statistics)

    def save(self, folder: Path, loaded: LoadedLens) -> None:
        """See :class:`megalens.checkpoint.formats.format.Format`."""
        folder.mkdir(parents=True, exist_ok=True)
        lens = loaded.lens
        weights = {stable: copied(lens.get_parameter(name)) for name, stable in stable_names(lens.lens_state_names()).items()}
        standard = (lens.mean, lens.var)
        paths = save_lens(folder, lens.config, Part(weights), loaded.statistics, standard, lens.subject.fingerprint)
        write_sums(folder, sums_of(folder, paths))


def save_lens(
    folder: Path, config: Config, weights: Part, statistics: ActivationStatistics, standard: tuple[Tensor, Tensor], fingerprint: str
) -> list[Path]:
    """Write a lens into a folder; of large weights only this rank's part.

    Args:
        weights: by stable names.
        statistics: of the training activations, what figures are measured against.
        standard: mean and variance ``[D]`` by which the lens standardises activations; others where it was started from another lens.
        fingerprint: of the subject's weights.

    Returns:
        The files written.
    """
    about = {
        "format": FORMAT,
        "format_version": VERSION,
        "width": len(statistics.mean),
        "subject": {"model_name": config.model_name, "layer_l": config.layer_l, "fingerprint": fingerprint},
        "versions": versions(),
        "config": config_to_dict(config) | {"revision": commit_of(config)},
    }
    written = weights.write(folder, "lens")
    kept = {field.name: getattr(statistics, field.name) for field in dataclasses.fields(ActivationStatistics)}
    kept |= {name: value.cpu().clone() for name, value in zip(_STANDARD, standard, strict=True)}
    save_tensors(folder / "stats.safetensors", kept)
    save_json(folder / "lens.json", about)
    return [*written, folder / "stats.safetensors", folder / "lens.json"]


def read_about(folder: str | Path) -> dict:
    """``lens.json`` of a checkpoint; ``config`` in it has its keys where they are now, ``format_version`` is that of the files.

    Raises:
        CheckpointError: there is none, or it is of another format.
    """
    path = Path(folder) / "lens.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it holds no lens.json; a run's best one is outputs/<run>/best")
    about = read_json(path)
    if about.get("format") != FORMAT or about.get("format_version") not in (megalens_v1.VERSION, VERSION):
        found, mend = f"{about.get('format')} version {about.get('format_version')}", "update megalens to read it"
        raise CheckpointError(f"{path} is of format {found}, not {FORMAT} version {VERSION} or older; {mend}")
    wrong = next((key for key, kind in _KINDS.items() if not isinstance(about.get(key, {} if key == "versions" else None), kind)), None)
    if wrong is None and not _SUBJECT.keys() <= about["subject"].keys():
        wrong = "subject"
    wrong = wrong or next((f"subject.{key}" for key, kind in _SUBJECT.items() if not isinstance(about["subject"][key], kind)), None)
    if wrong is not None:
        raise CheckpointError(f"{path} holds no '{wrong}' as it is written there: it was changed by hand or is damaged; copy it anew")
    if about["format_version"] == megalens_v1.VERSION:
        about["config"] = megalens_v1.config_of_now(about["config"])
    return about


def read_config(folder: str | Path, arguments: Sequence[str] = (), **changes: Any) -> Config:
    """The configuration a checkpoint's lens was trained with.

    Keys that it does not hold take their defaults. Unless the caller gives them, so do ``trust_remote_code`` (a checkpoint may come from
    anywhere and must not allow itself to run code) and the engine: a lens that was trained in shards may fit where it is used.

    Args:
        arguments: ``key=value`` that are other here.
        changes: the same as keywords, e.g. ``device="cpu"``; of a section only the keys that are given change.

    Raises:
        CheckpointError: it holds a key that this version does not know.
        ConfigError: a value is refused.
    """
    about = read_about(folder)
    saved = {key: value for key, value in about["config"].items() if key not in _NOT_TAKEN}
    unknown = next(_unknown_keys(saved), None)
    if unknown is not None:
        writer, here = (found.get("megalens", "of an unknown version") for found in (about.get("versions", {}), versions()))
        what = f"{Path(folder) / 'lens.json'} has the key '{unknown}' of megalens {writer}, which megalens {here} does not know"
        raise CheckpointError(f"{what}; read it with that version, or update this one")
    if "model_name" in changes or any(argument.removeprefix("--").startswith("model_name=") for argument in arguments):
        saved.pop("revision", None)  # that of the model it was trained on
    return config_from_dict(_merged(saved, changes), arguments)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The lens' weights, float32 on the CPU, by stable names.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    about = read_about(folder)
    weights: dict[str, Tensor] = {}
    paths = part_files(Path(folder), "lens")
    if not paths:
        raise CheckpointError(f"{folder} holds no lens.safetensors; copy the checkpoint anew from where it is whole")
    for path in paths:
        weights |= read_tensors(path)
    weights = megalens_v1.weights_of_now(weights) if about["format_version"] == megalens_v1.VERSION else weights
    return {name: value for name, value in weights.items() if ".lora_" not in name}  # copies that nothing used, which were saved once


def read_reference(folder: str | Path) -> dict[str, Tensor]:
    """What the verbalizer was when the training began, float32 on the CPU, by stable names; empty where no term wanted it.

    Raises:
        CheckpointError: it is damaged.
    """
    return {name: value for path in part_files(Path(folder), "reference") for name, value in read_tensors(path).items()}


def read_optimizer(folder: str | Path, names: Sequence[str]) -> OptimizerState:
    """The optimizer's state, for an engine.

    Args:
        names: of the lens' parameters in the module.

    Raises:
        EngineError: it is unreadable.
    """
    is_old = read_about(folder)["format_version"] == megalens_v1.VERSION
    return OptimizerState(Path(folder) / "engine", None if is_old else stable_names(names))


def read_statistics(folder: str | Path) -> ActivationStatistics:
    """The statistics of the activations it was trained on.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    kept = _read_kept(folder)
    return ActivationStatistics(**{field.name: kept[field.name] for field in dataclasses.fields(ActivationStatistics)})


def read_standard(folder: str | Path) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[D]`` by which the lens standardises activations; older checkpoints have them as its statistics alone.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    kept = _read_kept(folder)
    mean_D, var_D = (kept.get(name, kept[name.removeprefix("standard_")]) for name in _STANDARD)
    return mean_D, var_D


def _read_kept(folder: str | Path) -> dict[str, Tensor]:
    """What ``stats.safetensors`` holds: a vector of one length under each name."""
    path = Path(folder) / "stats.safetensors"
    kept = read_tensors(path)
    wanted = {field.name for field in dataclasses.fields(ActivationStatistics)}
    if not wanted <= kept.keys() or len({value.shape for value in kept.values()}) != 1 or kept["mean"].ndim != 1:
        raise CheckpointError(f"{path} does not hold {', '.join(sorted(wanted))} of one width: it is damaged; copy it anew")
    return kept


def check_subject(folder: str | Path, fingerprint: str) -> None:
    """Refuse a checkpoint of another subject.

    Raises:
        CheckpointError: the subject's weights are not those the lens was trained on.
    """
    subject = read_about(folder)["subject"]
    if subject["fingerprint"] != fingerprint:
        found = f"{subject['model_name']} with weights {subject['fingerprint']}"
        raise CheckpointError(f"{folder} is a lens of {found}, not of these ({fingerprint}); set model_name to where that model lies")


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


def _unknown_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys that no setting has."""
    for name, value in values.items():
        key = prefix + name
        if kind_of(key) is None:
            yield key
        elif isinstance(value, dict):
            yield from _unknown_keys(value, f"{key}.")


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values with some changed; of a section only the keys that are given."""
    result = dict(values)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        result[key] = _merged(values[key], value) if both else value
    return result
