"""Score and search on ranks that share a lens's weights, every rank with other texts; for :mod:`test_measure`. Prints JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tiny_run import tiny_config

from megalens.data.loader import ActivationLoader
from megalens.engine import build_engine, join_ranks, rank_and_size, shards_weights
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(Path(sys.argv[1]), sys.argv[2])
