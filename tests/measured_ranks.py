"""Score, search, evaluate and dump on ranks that share weights, every rank with other texts; for :mod:`test_measure`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from tiny_run import tiny_config

from megalens.checkpoint.formats import load_lens
from megalens.config import Config
from megalens.data.dump import dump
from megalens.data.loader import ActivationLoader
from megalens.data.source import ContextReader
from megalens.engine import build_engine, join_ranks, rank_and_size, shards_weights
from megalens.evaluate.evaluation import evaluate
from megalens.evaluate.measure import RowScorer, read_by_lens
from megalens.explain.search import search_named
from megalens.objective import build_lens

TEXTS = [["", "", "", ""], ["a river flows", "b", "", "castle and river of Arden"]]


def measure(folder: Path, engine_name: str) -> None:
    """Each rank its own four rows; a single process both ranks' rows in turn."""
    config = tiny_config(folder, "ranks")
    config.engine = "fsdp" if engine_name == "fsdp" else "auto"
    config.deepspeed = str(folder / "sharded.json") if engine_name == "zero3" else None
    join_ranks(torch.device("cpu"))
    rank, size = rank_and_size()
    loader = ActivationLoader(config.activation_dir("val"), 1, 0)
    statistics = loader.statistics
    lens = build_lens(config, statistics.mean, statistics.var, empty_blocks=shards_weights(config))
    engine = build_engine(config, lens, lens.parameter_groups(), None)
    lens.eval()
    for part in [rank] if size > 1 else range(len(TEXTS)):
        batch = loader.rows(range(4 * part, 4 * part + 4))
        with torch.no_grad():
            rows = RowScorer(lens, batch, statistics)(read_by_lens(lens, TEXTS[part]))
            said = search_named("best_of:2")(lens, batch["activation"], batch["sample_id"])
        kept = {name: rows[name].tolist() for name in ("error", "kl", "failed")}
        (folder / f"{engine_name}-{part}.json").write_text(json.dumps({"texts": said.texts, **kept}))
    engine.barrier()
    engine.close()
    use(folder, engine_name, config)


def use(folder: Path, engine_name: str, config: Config) -> None:
    """The commands' own work on a lens that nobody trains, and on the text."""
    keys = {"engine": config.engine, "deepspeed": config.deepspeed}
    lens = load_lens(folder / "outputs" / "tiny" / "best", **keys).lens
    held_out = ActivationLoader(lens.config.activation_dir("val"), 1, 0)
    result = evaluate(lens, held_out, lens.config, held_out.statistics, search_named("best_of:2"))
    lens.ranks.close()
    dumped = dataclasses.replace(lens.config, **keys)
    dumped.activation_dumper = dataclasses.replace(
        dumped.activation_dumper,
        root=str(folder / f"dumped-{engine_name}"),
        encoding="int8",
        layers=[0, 1],
        rows_per_shard=10,
        batch_size=4,
    )
    dump(dumped)
    statistics = ContextReader(dumped, "train").statistics
    if lens.ranks.is_main:
        kept = {"figures": result.figures, "documents": result.documents, "examples": result.examples, "mean": statistics.mean.tolist()}
        (folder / f"{engine_name}-used.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(Path(sys.argv[1]), sys.argv[2])
