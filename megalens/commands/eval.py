"""Measure a trained lens on held-out documents, beside every floor and ceiling, and write evaluation.json and report.html into its run.

usage: megalens eval checkpoint=outputs/<run>/best [key=value ...]
       torchrun --nproc_per_node N tools/eval.py checkpoint=... [engine=fsdp]   (ranks divide the rows; with engine=fsdp also the model)

  checkpoint=FOLDER               the lens: outputs/<run>/best, last, or one of outputs/<run>/checkpoints/
  evaluation.num_samples=N        held-out rows (-1: all)
  evaluation.bootstrap=N          resamples of documents for the 95 % intervals (0: no intervals)
  evaluation.search=S,S,...       how explanations are chosen, e.g. best_of:16+swaps (docs/search.md); after a comma, others to compare
  evaluation.search_rows=N        held-out rows on which searches are compared (-1: all)
  evaluation.other_reader=FOLDER  another lens that reads the compared texts too, in place of the untouched subject
  device=cpu|cuda dtype=bf16|fp32 where and how to compute
  engine=fsdp deepspeed=FILE      in shards, for a lens that fits in no process (docs/large.md); a checkpoint never says so itself
  trust_remote_code=true          run code that comes with the subject; a checkpoint never says so itself

Other keys are those the lens was trained with (conf/config.yaml lists them all). Needs the run's validation dump (tools/dump_acts.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megalens.arguments import Arguments
from megalens.checkpoint.checksums import read_json
from megalens.checkpoint.formats import load_lens, read_config
from megalens.config import Config
from megalens.data.identity import model_identity
from megalens.data.loader import ActivationLoader
from megalens.device import resolve_device
from megalens.engine import Ranks, join_ranks, shards_weights
from megalens.engine.failure import told_once
from megalens.evaluate import report
from megalens.evaluate.evaluation import evaluate, training_statistics
from megalens.evaluate.readers import SUBJECT, Reader, other_lens
from megalens.evaluate.table import comparison, examples, table
from megalens.evaluate.trust.knowledge import little_known, token_means_of
from megalens.evaluate.trust.rows import trust_rows
from megalens.evaluate.trust.suite import SHORT, judgement, run_parts
from megalens.explain.search import searches_named
from megalens.lens.lens import ConsistencyLens
from megalens.training.track import read_curve


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens eval checkpoint=outputs/<run>/best")
    parser.add_argument("--checkpoint", type=Path, required=True)
    args, settings = parser.split(arguments)
    with told_once():
        measure(args.checkpoint, settings)


def measure(folder: Path, settings: list[str]) -> None:
    """Measure a lens, and write and print what was found; every rank calls this."""
    config = read_config(folder, settings)
    device = resolve_device(config.device)
    join_ranks(device)
    search, *others = searches_named(config.evaluation.search)
    loader = ActivationLoader(config.activation_dir("val"), batch_size=1, seed=config.seed)
    loader.reader.check_matches(model_identity(config))
    loaded = load_lens(folder, **dataclasses.asdict(config))
    loader.reader.check_matches({"d": len(loaded.statistics.mean)})
    statistics, source = training_statistics(config, loaded)
    reader = reader_named(config, loaded.lens)
    if not shards_weights(config):
        loaded.lens.ranks = Ranks(device, config)
    means = token_means_of(config, statistics)
    result = evaluate(loaded.lens, loader, config, statistics, search, others=others, reader=reader, token_means=means)
    rows = trust_rows(loaded.lens, loader, statistics, search, config.evaluation.trust_rows, config.evaluation.batch_size)
    result.trust = run_parts(rows, little_known(rows, search, means), config.evaluation.bootstrap, SHORT)
    loaded.lens.ranks.close()
    if not loaded.lens.ranks.is_main:
        return
    result.setting |= {"statistics": source, "checkpoint": folder.resolve().name, "trained": training_length(folder, config.batch_size)}
    run = run_folder(folder)
    report.save(run, result, read_curve(run / "metrics.jsonl"))
    written = f"written: {run / 'evaluation.json'} and {run / 'report.html'}"
    print("\n" + "\n\n".join(filter(None, [table(result), comparison(result), judgement(result.trust), examples(result), written])))


def reader_named(config: Config, lens: ConsistencyLens) -> Reader:
    """The reader that ``evaluation.other_reader`` names: another lens, or the untouched subject."""
    name = config.evaluation.other_reader
    if name is None:
        return SUBJECT
    same = ("model_name", "tokenizer_name", "trust_remote_code", "device", "dtype")
    return other_lens(load_lens(Path(name), **{key: getattr(config, key) for key in same}).lens, lens, name)


def run_folder(checkpoint: Path) -> Path:
    """The run a checkpoint belongs to; a checkpoint that lies elsewhere is its own."""
    if checkpoint.is_symlink():
        return checkpoint.parent
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def training_length(checkpoint: Path, batch_size: int) -> str | None:
    """How long the lens was trained, in words, where the checkpoint tells."""
    path = checkpoint / "trainer.json"
    if not path.is_file():
        return None
    steps = read_json(path)["progress"]["step"]
    return f"{steps:,} micro-steps of {batch_size} rows"
