"""The small default experiment: what is trained when nothing but, at most, the engine is named."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from megalens.config import Config, load_config
from megalens.launcher import launched, rank

DEMO, TINY = "config=conf/demo_warmstart.yaml", "config=conf/tiny.yaml"
ENGINE = ("deepspeed", "engine", "device", "local_rank", "local-rank")  # keys that say how, not what


def with_experiment(arguments: list[str]) -> list[str]:
    """The arguments, completed where they name no configuration and no setting but the engine's.

    The experiment is then the demo's warm start where its activations have been dumped (``make demo`` does), and else conf/tiny.yaml,
    whose model, text and activations are made here in seconds; to be called by every rank. The run is ``outputs/default_<its name>``. A
    batch that the ranks cannot share evenly is made as much larger as it takes.
    """
    if not _names_engine_only(arguments):
        return arguments
    from megalens.data import dump

    demo = load_config([*arguments, DEMO])
    dumped = (Path(demo.model_name) / "config.json").is_file() and not any(dump.check(demo, split) for split in dump.SPLITS)
    chosen = DEMO if dumped else TINY
    config = load_config([*arguments, chosen])
    run_name = f"default_{config.run_name}"
    if rank() == 0:
        why = "" if dumped else " (the demo's activations are not there; make demo makes them)"
        print(f"no config= and no settings: training {chosen.removeprefix('config=')}{why}", file=sys.stderr, flush=True)
    if not dumped:
        _make_tiny(config)
    pairs = 2 * launched().size
    return [*arguments, chosen, f"run_name={run_name}", f"batch_size={-(-config.batch_size // pairs) * pairs}"]


def _names_engine_only(arguments: list[str]) -> bool:
    keys = [argument.removeprefix("--").partition("=")[0] for argument in arguments]
    files = [i + 1 for i, argument in enumerate(arguments) if argument == "--deepspeed"]
    return all(key in ENGINE for i, key in enumerate(keys) if i not in files)


def _make_tiny(config: Config) -> None:
    from megalens import tiny
    from megalens.data.dump import dump
    from megalens.data.pretokenize import pretokenize
    from megalens.files import Lock

    model, text = Path(config.model_name), Path(config.dataset.name)
    for path, make in ((model, tiny.make_model), (text, tiny.make_text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.parent / f".{path.name}.lock"):
            if not path.exists():
                unfinished = path.with_name(f".{path.name}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished).rename(path)
    pretokenize(config)
    dump(config)
