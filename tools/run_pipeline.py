"""Pretokenize, dump and train in one command, reusing what is there and valid.

    python tools/run_pipeline.py config=conf/demo.yaml
    python tools/run_pipeline.py config=conf/demo.yaml force_redump=true learning_rate=1e-4
    python tools/run_pipeline.py --deepspeed ds_configs/z3.json config=conf/demo.yaml

When the config's init_from names another config, that one's training runs first (and so on down the line). key=value settings hold for
the last training; those that say which data and which lens it is (model_name, layer_l, t_text, dataset.*, ...) for the earlier ones too.
It is also the program of a sweep's trials: several at a time share one dump and one warm start, made by whoever comes first, and
force_redump=true makes the data anew once per sweep.

Each stage is a command of its own and is printed before it runs. Ctrl-C and SIGTERM let the running stage finish cleanly, and the
same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megalens import cli
from megalens.config import Config, ConfigError, load_config
from megalens.files import Lock
from megalens.sweep.trial import any_sweep, as_trial, outside_the_sweep
from megalens.training.signals import end_with_parent

ROOT = Path(__file__).resolve().parents[1]
# What a warm start must have in common with the training that starts from it: the data and the lens.
SHARED = {
    "model_name",
    "tokenizer_name",
    "trust_remote_code",
    "layer_l",
    "t_text",
    "tail_order",
    "train_mode",
    "lora",
    "verbalizer",
    "reconstructor",
}
SHARED |= {"dataset", "pretokenize", "activation_dumper", "output_dir", "device", "dtype", "wandb", "deepspeed"}


@dataclasses.dataclass
class Phase:
    """One training: its configuration and the arguments that give it."""

    config: Config
    arguments: list[str]


def main(arguments: list[str]) -> int:
    *earlier, last = plan(arguments)
    runner = Runner()
    made: set[Path] = set()
    for phase in (*earlier, last):
        for tool, target, problem in data_stages(phase.config):
            with runner.turn_at(target):
                prepare(runner, phase, tool, target, problem(), last.config.force_redump and target not in made)
            made.add(target)
        if phase is not last:
            with runner.turn_at(phase.config.run_dir):
                train(runner, phase, outside_the_sweep())
    train(runner, last)
    say(f"trained; measure the best checkpoint: python tools/eval.py checkpoint={as_trial(last.config).run_dir / 'best'}")
    return 0


def prepare(runner: Runner, phase: Phase, tool: str, target: Path, why_not: str | None, force: bool) -> None:
    """Make a stage's data when it is missing or asked for; for a sweep that asks, once."""
    note = target.parent / f".{target.name}.sweep"
    if force and any_sweep() and note.is_file() and note.read_text() == any_sweep():
        force = False
    if why_not is None and not force:
        say(f"{target}: valid, reusing it")
        return
    say(f"{target}: {'made anew, as force_redump=true asks' if force else why_not}")
    runner.run([sys.executable, str(ROOT / "tools" / tool), *phase.arguments, *(["force_redump=true"] if force else [])])
    if force and any_sweep():
        note.write_text(any_sweep())


def train(runner: Runner, phase: Phase, environment: dict[str, str] | None = None) -> None:
    """Run a training."""
    say(f"{phase.config.run_dir if environment else as_trial(phase.config).run_dir}: training")
    runner.run([*launcher(phase.config), *phase.arguments], environment)


def plan(arguments: list[str]) -> list[Phase]:
    """The trainings to run, in order: the one asked for is last, before it those whose lens it starts from.

    Raises:
        ConfigError: a config is wrong, or a chain of ``init_from`` leads back to itself.
    """
    settings = dict(split_setting(argument) for argument in join_deepspeed(arguments))
    settings.pop("force_redump", None)
    phases = [Phase(load_config(arguments), as_arguments(settings))]
    seen = [settings.get("config")]
    while (parent := phases[0].config.init_from) and parent.endswith((".yaml", ".yml")):
        if parent in seen:
            raise ConfigError(f"init_from leads back to {parent}: {' -> '.join(map(str, [*seen, parent]))}")
        seen.append(parent)
        shared = {key: value for key, value in settings.items() if key.split(".")[0] in SHARED}
        inherited = as_arguments({"config": parent, **shared})
        phases.insert(0, Phase(load_config(inherited), inherited))
    return phases


def data_stages(config: Config) -> Iterator[tuple[str, Path, Callable[[], str | None]]]:
    """(tool, what it makes, what tells why that which is there does not serve)."""
    from megalens.data import dump, pretokenize

    def dump_problem() -> str | None:
        problems = ((split, dump.check(config, split)) for split in ("train", "val"))
        return next((f"{split} split: {problem}" for split, problem in problems if problem is not None), None)

    yield "pretokenize.py", config.pretokenized_dir, lambda: pretokenize.why_stale(config)
    yield "dump_acts.py", config.activation_dir("train"), dump_problem


def launcher(config: Config) -> list[str]:
    """The command that starts the training, without its settings."""
    if config.deepspeed is None:
        return [sys.executable, str(ROOT / "megalens" / "train.py")]
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError(f"deepspeed={config.deepspeed}, but the deepspeed command is not installed: pip install -e '.[deepspeed]'")
    return [found, "--master_port", str(free_port()), str(ROOT / "megalens" / "train.py")]


def free_port() -> int:
    """A port that nobody listens on: several trainings on one machine each need their own."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


# --------------------------------------------------------------------------------------------------------- arguments


def join_deepspeed(arguments: list[str]) -> Iterator[str]:
    """The arguments with ``--deepspeed FILE`` as one ``deepspeed=FILE``."""
    rest = iter(arguments)
    for argument in rest:
        yield f"deepspeed={next(rest, '')}" if argument == "--deepspeed" else argument


def split_setting(argument: str) -> tuple[str, str]:
    key, _, value = argument.removeprefix("--").partition("=")
    return key, value


def as_arguments(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


# ------------------------------------------------------------------------------------------------------------ stages


class Runner:
    """Runs stages one after another; a stop signal goes to the running stage, and no other starts after it."""

    def __init__(self) -> None:
        self.stage: subprocess.Popen | None = None
        self.stopped_by: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    @contextmanager
    def turn_at(self, target: Path) -> Iterator[None]:
        """While entered, no other pipeline makes ``target``; waits until it is free."""
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(target.parent / f".{target.name}.pipeline")
        waits = False
        while not lock.acquire(wait=False):
            if not waits:
                say(f"{target}: another pipeline is making it, waiting")
            waits = True
            time.sleep(0.5)
            self._leave_if_stopped()
        try:
            yield
        finally:
            lock.release()

    def _leave_if_stopped(self) -> None:
        if self.stopped_by is not None:
            say("stopped; the same command goes on from here")
            sys.exit(128 + self.stopped_by)

    def run(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        """Run a stage to its end, in this process's environment unless another is given.

        Raises:
            SystemExit: the stage failed (its exit code), or a signal stopped it (128 + signal). It has printed its own error.
        """
        if self.stopped_by is None:
            say("$ " + shlex.join(command))
            # Own session: Ctrl-C reaches the stage once, through us, and not a second time through the terminal.
            self.stage = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
            code = self.stage.wait()
            self.stage = None
        self._leave_if_stopped()
        if code:
            name = next(Path(part).name for part in command if part.endswith(".py"))
            say(f"{name} failed; the same command goes on from here once that is mended")
            sys.exit(code if code > 0 else 128 - code)

    def _stop(self, number: int, _frame) -> None:
        self.stopped_by = number
        if self.stage is not None:
            self.stage.send_signal(number)


def say(line: str) -> None:
    print(f"[pipeline] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, __doc__)
