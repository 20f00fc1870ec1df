"""Pretokenize, dump and train in one command, reusing what is there and valid.

    python tools/run_pipeline.py config=conf/demo.yaml
    python tools/run_pipeline.py config=conf/demo.yaml force_redump=true learning_rate=1e-4
    python tools/run_pipeline.py --deepspeed ds_configs/z3.json config=conf/demo.yaml

When the config's init_from names another config, that one's training runs first (and so on down the line). key=value settings hold for
the last training; those that say which data and which lens it is (model_name, layer_l, t_text, dataset.*, ...) for the earlier ones too.
Each stage is a command of its own and is printed before it runs. Ctrl-C and SIGTERM let the running stage finish cleanly, and the
same command goes on from there.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megalens import cli
from megalens.config import Config, ConfigError, load_config

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
    phases = plan(arguments)
    runner = Runner()
    force = phases[-1].config.force_redump
    made: set[Path] = set()
    for phase in phases:
        config = phase.config
        for tool, target, why_not in data_stages(config):
            forced = force and target not in made
            made.add(target)
            if why_not is None and not forced:
                say(f"{target}: valid, reusing it")
                continue
            say(f"{target}: {'made anew, as force_redump=true asks' if forced else why_not}")
            runner.run([sys.executable, str(ROOT / "tools" / tool), *phase.arguments, *(["force_redump=true"] if forced else [])])
        say(f"{config.run_dir}: training")
        runner.run([*launcher(config), *phase.arguments])
    best = phases[-1].config.run_dir / "best"
    say(f"trained; measure the best checkpoint: python tools/eval.py checkpoint={best}")
    return 0


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


def data_stages(config: Config) -> Iterator[tuple[str, Path, str | None]]:
    """(tool, what it makes, why what is there does not serve). Lazy: a dump is checked after its text is there."""
    from megalens.data import dump, pretokenize

    yield "pretokenize.py", config.pretokenized_dir, pretokenize.is_current(config)
    problems = ((split, dump.check(config, split)) for split in ("train", "val"))
    why_not = next((f"{split} split: {problem}" for split, problem in problems if problem is not None), None)
    yield "dump_acts.py", config.activation_dir("train"), why_not


def launcher(config: Config) -> list[str]:
    """The command that starts the training, without its settings."""
    if config.deepspeed is None:
        return [sys.executable, str(ROOT / "megalens" / "train.py")]
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError(f"deepspeed={config.deepspeed}, but the deepspeed command is not installed: pip install -e '.[deepspeed]'")
    return [found, str(ROOT / "megalens" / "train.py")]


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

    def run(self, command: list[str]) -> None:
        """Run a stage to its end.

        Raises:
            SystemExit: the stage failed (its exit code), or a signal stopped it (128 + signal). It has printed its own error.
        """
        if self.stopped_by is None:
            say("$ " + shlex.join(command))
            # Own session: Ctrl-C reaches the stage once, through us, and not a second time through the terminal.
            self.stage = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)
            code = self.stage.wait()
            self.stage = None
        if self.stopped_by is not None:
            say("stopped; the same command goes on from here")
            sys.exit(128 + self.stopped_by)
        if code:
            say(f"{Path(command[1]).name} failed; the same command goes on from here once that is mended")
            sys.exit(code if code > 0 else 128 - code)

    def _stop(self, number: int, _frame) -> None:
        self.stopped_by = number
        if self.stage is not None:
            self.stage.send_signal(number)


def _end_with_parent() -> None:
    """On Linux, a stage whose pipeline is killed is told to stop, so that the next attempt finds nobody at work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def say(line: str) -> None:
    print(f"[pipeline] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, __doc__)
