"""Where a training starts: at its own last checkpoint, at another run's lens, or fresh."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import check_checkpoint, read_json
from megalens.checkpoint.formats import format_of, load_lens, read_config
from megalens.checkpoint.formats.megalens import (
    Megalens,
    check_subject,
    read_about,
    read_reference,
    read_standard,
    read_statistics,
    read_weights,
)
from megalens.checkpoint.run_folder import RunFolder
from megalens.config import Config, load_config
from megalens.data.loader import ActivationLoader
from megalens.device import resolve_dtype
from megalens.engine import rank_and_size, shards_weights
from megalens.engine.state import copied
from megalens.files import Lock
from megalens.launcher import rank
from megalens.lens.names import stable_names
from megalens.statistics import ActivationStatistics
from megalens.training.progress import TRAINER_VERSION, Progress, first_wrong

_SAME = ("layer_l", "t_text", "tail_order", "batch_size", "gradient_accumulation_steps", "seed")
_SAME_PARTS = ("verbalizer", "reconstructor", "lora")
_FREE = ("verbalizer.checkpoint_every_n_tokens",)  # memory and time only
_PATIENCE = 20.0  # seconds for a training to end that was told to stop, or whose launcher is gone


@dataclass
class Start:
    """What a training starts with.

    Attributes:
        progress: where it stands.
        statistics: of its training activations; its figures are measured against them.
        standard: mean and variance ``[D]`` by which the lens standardises activations, those of the rows it was first trained on.
        weights: by stable names, those of the verbalizer as it was when the training began too where it resumes; None for a fresh lens.
        resumed: the checkpoint it resumes from, optimizer state included; None where it does not resume.
        where: where it starts, for messages.
    """

    progress: Progress
    statistics: ActivationStatistics
    standard: tuple[Tensor, Tensor]
    weights: dict[str, Tensor] | None = None
    resumed: Path | None = None
    where: str = "fresh"


@contextmanager
def sole_training(config: Config) -> Iterator[None]:
    """While entered, no other training writes the run's folder. Rank 0 takes the lock, before the ranks join and wait for each other.

    Raises:
        CheckpointError: another training holds it, and does not stop within 20 seconds.
    """
    if rank():
        yield
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    lock = Lock(config.run_dir / ".training")
    _take(lock, config.run_dir)
    try:
        yield
    finally:
        lock.release()


def _take(lock: Lock, folder: Path) -> None:
    until = None
    while not lock.acquire(wait=False):
        other = lock.path.read_text(encoding="utf-8").strip() or "another process"
        if until is None:
            until = time.monotonic() + _PATIENCE
            print(f"{folder}: {other} trains there; waiting up to {_PATIENCE:.0f} s for it to stop", file=sys.stderr)
        elif time.monotonic() > until:
            raise CheckpointError(f"{folder} is being trained by {other}; let it finish, stop it, or choose another run_name")
        time.sleep(0.2)
    os.truncate(lock.fileno(), 0)
    os.pwrite(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def open_folder(config: Config, rank: int) -> RunFolder:
    """Open the run's folder. Rank 0 tidies it before any other rank looks; with ``checkpoint.resume=false`` it removes all checkpoints.

    Raises:
        CheckpointError: on rank 0; the checkpoints can be neither resumed from nor removed.
    """
    folder = RunFolder(config.run_dir)
    if rank == 0:
        if config.checkpoint.resume:
            note = folder.tidy()
        else:
            note = f"checkpoint.resume=false: the earlier checkpoints of {config.run_dir} are removed" if folder.clear() else None
        if note:
            print(note, file=sys.stderr)
    if dist.is_initialized():
        dist.barrier()
    return folder


def identity(config: Config, fingerprint: str, rows: str) -> dict:
    """What must stay the same for a training to resume: the lens' shape, and what the order of samples depends on.

    Args:
        fingerprint: of the subject.
        rows: the training loader's ``identity``.
    """
    return {"model_name": fingerprint, "dump": rows, "dtype": resolve_dtype(config)} | _settings_of(config)


def _settings_of(config: Config) -> dict:
    settings = {key: getattr(config, key) for key in _SAME}
    for part in _SAME_PARTS:
        settings |= {f"{part}.{key}": value for key, value in dataclasses.asdict(getattr(config, part)).items()}
    settings |= {f"{role}.mode": config.mode_of(role) for role in ("verbalizer", "reconstructor")}
    return {key: value for key, value in settings.items() if key not in _FREE}


def find_start(config: Config, run: RunFolder, loader: ActivationLoader, same: dict) -> Start:
    """Where this training starts.

    Args:
        run: its folder.
        loader: of the training rows, for their statistics.
        same: its :func:`identity`.

    Raises:
        CheckpointError: the last checkpoint is of another training, or the lens of ``init_from`` does not fit.
    """
    if config.checkpoint.resume and (last := run.last) is not None:
        return _resumed(config, run, last, same)
    if config.init_from is not None:
        return _initialised(config, same["model_name"], loader)
    statistics = loader.statistics
    return Start(Progress(), statistics, (statistics.mean, statistics.var))


def _resumed(config: Config, run: RunFolder, last: Path, same: dict) -> Start:
    _check_together(last)
    saved = read_json(last / "trainer.json")
    if saved.get("format_version") != TRAINER_VERSION:
        raise CheckpointError(f"{last} is of another version of megalens; start anew with checkpoint.resume=false")
    reference = _reference(last, config)
    progress, before = _progress(saved, last), _defaults() | saved["identity"]
    changed = [key for key in same if before.get(key) != same[key]]
    if changed:
        was = ", ".join(f"{key}={before.get(key)} (now {same[key]})" for key in changed)
        mend = "set it back, choose another run_name, or start anew with checkpoint.resume=false"
        raise CheckpointError(f"{run.folder} was begun with {was}; {mend}")
    where = f"{last.name} of {run.folder}"
    return Start(progress, read_statistics(last), read_standard(last), read_weights(last) | reference, last, where)


def _reference(last: Path, config: Config) -> dict[str, Tensor]:
    """What the verbalizer was when the training began, where a term wants it.

    Raises:
        CheckpointError: none wanted it until now.
    """
    if not config.terms.get("reference_kl"):
        return {}
    found = read_reference(last)
    if not found:
        what = f"{last} does not hold the verbalizer as it was when the training began: terms.reference_kl had no weight so far"
        raise CheckpointError(f"{what}; set it to 0, or begin another run at this lens with init_from={last}")
    return found


def _progress(saved: dict, folder: Path) -> Progress:
    """Where a saved training stands.

    Raises:
        CheckpointError: ``trainer.json`` lacks a part of it, or holds a key that this version does not know.
    """
    complete = all(isinstance(saved.get(key), dict) for key in ("progress", "identity"))
    progress = saved["progress"] if complete else {}
    unknown = sorted(progress.keys() - {each.name for each in dataclasses.fields(Progress)})
    wrong = first_wrong(progress)
    if not complete or unknown or wrong or progress.get("step", 0) < 0:
        what = f"'{unknown[0]}', which this version of megalens does not know" if unknown else "no progress or identity"
        what = f"a {wrong or 'step'} that no training writes" if complete and not unknown else what
        raise CheckpointError(f"{folder / 'trainer.json'} holds {what}; copy it anew, or start anew with checkpoint.resume=false")
    return Progress(**progress)


def _defaults() -> dict:
    """The values of those keys of an :func:`identity` that an older version did not write."""
    return _settings_of(Config())


def _check_together(folder: Path) -> None:
    """Check a checkpoint's files against their checksums, each rank a share of them.

    Raises:
        CheckpointError: on all ranks; a file is damaged.
    """
    rank, size = rank_and_size()
    problems: list[str | None] = [None]
    try:
        check_checkpoint(folder, slice(rank, None, size))
    except CheckpointError as error:
        problems = [str(error)]
    if size > 1:
        (mine,), problems = problems, [None] * size
        dist.all_gather_object(problems, mine)
    for problem in filter(None, problems):
        raise CheckpointError(problem)


def _initialised(config: Config, fingerprint: str, loader: ActivationLoader) -> Start:
    folder, width = source_folder(config), loader.reader.meta["d"]
    layer, weights, standard = _read_lens(folder, config, fingerprint)
    if len(standard[0]) != width:
        raise CheckpointError(f"init_from={config.init_from} is of another width: {len(standard[0])}, the activations here are of {width}")
    if layer != config.layer_l:
        raise CheckpointError(f"init_from={config.init_from} is a lens of layer_l={layer}, not of layer_l={config.layer_l}")
    _check_adapters(config, folder)
    return Start(Progress(), loader.statistics, standard, weights, where=str(folder))


def _read_lens(folder: Path, config: Config, fingerprint: str) -> tuple[int, dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Layer, weights by stable names, and the mean and variance to standardise by, of a lens in whichever format.

    Raises:
        CheckpointError: it is of another subject, or the engine shards what its format can only read whole.
    """
    kind = format_of(folder)
    if isinstance(kind, Megalens):
        check_subject(folder, fingerprint)
        return read_about(folder)["subject"]["layer_l"], read_weights(folder), read_standard(folder)
    if shards_weights(config):
        mend = "train it for one step in one process without --deepspeed and engine=fsdp, and name the checkpoint of that run"
        raise CheckpointError(f"init_from={folder} is of the format {kind.name}, which cannot be read in shards; {mend}")
    here = {"model_name": config.model_name, "device": "cpu", "dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    lens = load_lens(folder, **here).lens
    weights = {stable: copied(lens.get_parameter(name)).float() for name, stable in stable_names(lens.lens_state_names()).items()}
    return lens.config.layer_l, weights, (lens.mean, lens.var)


def _check_adapters(config: Config, folder: Path) -> None:
    """A lens goes on with the adapters that it has: of their rank and layers, and scaled as they were.

    Raises:
        CheckpointError: a role's adapters are to be others here.
    """
    given = read_config(folder)
    for role in ("verbalizer", "reconstructor"):
        if (was := given.mode_of(role)) != config.mode_of(role):
            raise CheckpointError(f"init_from={folder} has {role}.mode={was}, not {config.mode_of(role)}; set {role}.mode={was}")
        theirs, mine = (dataclasses.asdict(each.lora_of(role)) for each in (given, config))
        other = [key for key in ("r", "alpha", "rslora", "targets") if theirs[key] != mine[key]]
        if was == "lora" and other:
            is_own = getattr(getattr(config, role).lora, other[0]) not in (None, [])
            key = f"{role}.lora.{other[0]}" if is_own else f"lora.{other[0]}"
            raise CheckpointError(
                f"init_from={folder} goes on with its own adapters: set {key}={theirs[other[0]]} (here it is {mine[other[0]]})"
            )


def source_folder(config: Config) -> Path:
    """The checkpoint that ``init_from`` names: a checkpoint's folder, or a configuration, whose run's best checkpoint is meant.

    Raises:
        CheckpointError: there is none.
    """
    if config.init_from is None:
        raise CheckpointError("init_from names no checkpoint; name one, as in init_from=outputs/<run>/best")
    source = Path(config.init_from)
    if source.suffix not in (".yaml", ".yml"):
        try:
            format_of(source)
        except CheckpointError as error:
            raise CheckpointError(f"init_from={error}") from None
        return source
    folder = load_config([f"config={source}", f"output_dir={config.output_dir}"]).run_dir / "best"
    if not (folder / "lens.json").is_file():
        mend = f"train it first: python megalens/train.py config={source}"
        raise CheckpointError(f"init_from={source}: its run has no checkpoint in {folder}; {mend}")
    return folder
