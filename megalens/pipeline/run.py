"""The stages run on this machine, reusing what is there and valid."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import torch

from megalens.config import Config, ConfigError
from megalens.device import resolve_device
from megalens.pipeline.runner import Runner, say
from megalens.pipeline.stages import DataStage, Phase, data_stages, why_kept
from megalens.sweep.trial import any_sweep, as_trial, outside_the_sweep

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def run_stages(phases: list[Phase]) -> None:
    """Make the data of each phase and train it, in order; the last one asks for new data with ``force_redump``.

    Raises:
        SystemExit: a stage failed or was stopped (:meth:`Runner.run`).
        ConfigError: the DeepSpeed that a phase asks for is not installed.
    """
    *_, last = phases
    runner = Runner()
    made: set[Path] = set()
    for phase in phases:
        for stage in data_stages(phase.config):
            with runner.turn_at(stage.target):
                _prepare(runner, phase, stage, last.config.force_redump and stage.target not in made)
            made.add(stage.target)
        if phase is not last:
            with runner.turn_at(phase.config.run_dir):
                _train(runner, phase, outside_the_sweep())
    _train(runner, last)
    say(f"trained; measure the best checkpoint: python tools/eval.py checkpoint={as_trial(last.config).run_dir / 'best'}")


def _prepare(runner: Runner, phase: Phase, stage: DataStage, force: bool) -> None:
    """Make a stage's data when it is missing or asked for; for a sweep that asks, once."""
    sweep, note = any_sweep(), stage.target.parent / f".{stage.target.name}.sweep"
    if force and sweep and note.is_file() and note.read_text() == sweep:
        force = False
    why_not = stage.problem()
    if why_not is None and not force:
        say(f"{stage.target}: {why_kept(stage.target)}")
        return
    say(f"{stage.target}: {'made anew, as force_redump=true asks' if force else why_not}")
    runner.run(stage.command, [*data_command(stage.command), *phase.arguments, *(["force_redump=true"] if force else [])])
    if force and sweep:
        note.write_text(sweep)


def _train(runner: Runner, phase: Phase, environment: dict[str, str] | None = None) -> None:
    say(f"{phase.config.run_dir if environment else as_trial(phase.config).run_dir}: training")
    runner.run("train", [*train_command(phase.config), *phase.arguments], environment)


def data_command(name: str) -> list[str]:
    """What starts a command of this megalens; the working folder hides none of its packages (-P)."""
    return [sys.executable, "-P", "-m", "megalens", name]


def train_command(config: Config) -> list[str]:
    """What starts a training, without its settings: for an engine that shards, a process per GPU.

    Raises:
        ConfigError: DeepSpeed is asked for and not installed.
    """
    script = str(TRAIN)
    if config.engine == "fsdp":
        gpus = torch.cuda.device_count() if resolve_device(config.device).type == "cuda" else 0
        if gpus > 1:
            return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), script]
        say("engine=fsdp: in one process, which shards nothing; this machine shows no second GPU")
    if config.deepspeed is None:
        return [sys.executable, script]
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError(f"deepspeed={config.deepspeed}, but the deepspeed command is not installed: pip install -e '.[deepspeed]'")
    return [found, "--master_port", str(_free_port()), script]


def _free_port() -> int:
    """A port that nobody listens on: several trainings on one machine each need their own."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
