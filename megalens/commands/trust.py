"""Measure whether a lens's words can be trusted: every figure with controls, interval and verdict, into trust.json of its run.

usage: megalens trust checkpoint=outputs/<run>/best [parts=NAME,NAME] [key=value ...]

  checkpoint=FOLDER           the lens: outputs/<run>/best, last, or one of outputs/<run>/checkpoints/
  parts=NAME,...              only some of: identification reading chance words labels leverage consensus unusual texts planted
  evaluation.trust_rows=N     held-out rows (the planted concepts have contexts of their own)
  evaluation.search=S         how the lens's texts are chosen
  device=cpu|cuda dtype=bf16|fp32 where and how to compute
  trust_remote_code=true      run code that comes with the subject; a checkpoint never says so itself

A part that is done is kept: the same command goes on where it was stopped. None of these figures may choose or train a lens.
docs/trust.md says what each is. Needs the run's validation dump (tools/dump_acts.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megalens.arguments import Arguments
from megalens.checkpoint.formats import load_lens, read_config
from megalens.commands.eval import run_folder, training_length
from megalens.config import ConfigError
from megalens.data.identity import model_identity
from megalens.data.loader import ActivationLoader
from megalens.evaluate.evaluation import training_statistics
from megalens.evaluate.trust.knowledge import known_of
from megalens.evaluate.trust.rows import trust_rows
from megalens.evaluate.trust.suite import PARTS, keep, kept, run_parts, table
from megalens.explain.search import searches_named
from megalens.files import checksum
from megalens.launcher import launched


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens trust checkpoint=outputs/<run>/best")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    args, settings = parser.split(arguments)
    names = tuple(args.parts.split(","))
    if unknown := set(names) - PARTS.keys():
        raise ConfigError(f"parts={args.parts}: there is no part '{min(unknown)}'; there are: {', '.join(PARTS)}")
    if launched().size > 1:
        raise ConfigError("the suite runs in one process; start it without torchrun or srun")
    folder = args.checkpoint
    config = read_config(folder, settings)
    search, *_ = searches_named(config.evaluation.search)
    loader = ActivationLoader(config.activation_dir("val"), batch_size=1, seed=config.seed)
    loader.reader.check_matches(model_identity(config))
    loaded = load_lens(folder, **dataclasses.asdict(config))
    statistics, source = training_statistics(config, loaded)
    options = config.evaluation
    rows = trust_rows(loaded.lens, loader, statistics, search, options.trust_rows, options.batch_size)
    setting = {
        "checkpoint": folder.resolve().name,
        "checksums": checksum(folder / "checksums.json") if (folder / "checksums.json").is_file() else None,
        "trained": training_length(folder, config.batch_size),
        "model": config.model_name,
        "layer_l": config.layer_l,
        "dataset": config.dataset_label,
        "search": search.name,
        "rows": len(rows),
        "bootstrap": options.bootstrap,
        "statistics": source,
    }
    path = run_folder(folder) / "trust.json"
    found = run_parts(rows, known_of(rows, config, search), options.bootstrap, names, kept(path, setting), keep(path, setting), True)
    print(f"\n{table(found)}\n\nwritten: {path}")
