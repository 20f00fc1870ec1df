"""Which trainings a command line asks for, and which data each of them needs first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megalens.config import Config, ConfigError, load_config
from megalens.data import dump, pretokenize

# What a warm start must have in common with the training that starts from it: the data, the lens, and where there is room for it.
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
SHARED |= {"dataset", "pretokenize", "activation_dumper", "on_the_fly", "mix", "output_dir", "wandb"}
SHARED |= {"device", "dtype", "engine", "fsdp", "deepspeed"}


@dataclass
class Phase:
    """One training: its configuration and the arguments that give it."""

    config: Config
    arguments: list[str]


class DataStage(NamedTuple):
    """One thing that a training needs on disk.

    Attributes:
        command: which of megalens' commands makes it.
        target: the folder it lies in.
        problem: says why what lies there does not serve; None: it does.
    """

    command: str
    target: Path
    problem: Callable[[], str | None]


def phases_of(arguments: list[str]) -> list[Phase]:
    """The trainings to run, in order: the one asked for is last, before it those whose lens it starts from.

    Raises:
        ConfigError: a config is wrong, or a chain of ``init_from`` leads back to itself.
    """
    settings = dict(_split_setting(argument) for argument in _join_deepspeed(arguments))
    settings.pop("force_redump", None)
    phases = [Phase(load_config(arguments), _as_arguments(settings))]
    seen = [settings.get("config")]
    while (parent := phases[0].config.init_from) and parent.endswith((".yaml", ".yml")):
        if parent in seen:
            raise ConfigError(f"init_from leads back to {parent}: {' -> '.join(map(str, [*seen, parent]))}")
        seen.append(parent)
        shared = {key: value for key, value in settings.items() if key.split(".")[0] in SHARED}
        inherited = _as_arguments({"config": parent, **shared})
        phases.insert(0, Phase(load_config(inherited), inherited))
    return phases


def data_stages(config: Config) -> Iterator[DataStage]:
    """What a training needs on disk, in the order in which it is made."""

    def dump_problem() -> str | None:
        problems = ((split, dump.check(config, split)) for split in ("train", "val"))
        return next((f"{split} split: {problem}" for split, problem in problems if problem is not None), None)

    def tokens_problem() -> str | None:
        is_done = not config.on_the_fly and dump_problem() is None  # nothing but the dump reads the tokens
        return None if is_done else pretokenize.why_stale(config)

    yield DataStage("pretokenize", config.pretokenized_dir, tokens_problem)
    yield DataStage("dump", config.activation_dir("train"), dump_problem)


def why_kept(target: Path) -> str:
    """Why a stage has nothing to do."""
    return "valid, reusing it" if target.exists() else "not needed, as what is made of it is valid"


def _join_deepspeed(arguments: list[str]) -> Iterator[str]:
    """The arguments with ``--deepspeed FILE`` as one ``deepspeed=FILE``."""
    rest = iter(arguments)
    for argument in rest:
        yield f"deepspeed={next(rest, '')}" if argument == "--deepspeed" else argument


def _split_setting(argument: str) -> tuple[str, str]:
    key, _, value = argument.removeprefix("--").partition("=")
    return key, value


def _as_arguments(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]
