"""The loader's two-level order against a full shuffle, on the curve of a training.

    python benchmarks/shuffle.py [--seeds 5] [--windows 1,4] config=conf/tiny.yaml key=value ...

Trains the configuration, whose activations must have been dumped, once per seed in the full shuffle (a window that holds the whole dump)
and in windows of so many record batches: rows are mixed inside a window only. The verdict is of the held-out loss at each validation:
`difference` is the mean over the seeds of windowed minus full, `spread` the standard deviation between seeds of the full shuffle, both
relative to the loss, both at the validation where they lie furthest apart. One JSON line per window.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from megalens.config import load_config  # noqa: E402
from megalens.data import source  # noqa: E402
from megalens.data.loader import ActivationLoader, window_bytes_of  # noqa: E402
from megalens.data.shards import ShardReader  # noqa: E402
from megalens.train import train  # noqa: E402
from megalens.training.track import read_curve  # noqa: E402


def main() -> None:
    """Train in each order and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default: 5)")
    parser.add_argument("--windows", default="1,4", help="record batches that are mixed (default: 1,4)")
    parser.add_argument("settings", nargs="*", help="the configuration: config=FILE key=value ...")
    options = parser.parse_args()
    settings, windows = options.settings, [int(size) for size in options.windows.split(",")]
    meta = ShardReader(load_config(settings).activation_dir("train")).meta
    batches = sum(-(-shard["rows"] // meta["rows_per_batch"]) for shard in meta["shards"])
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            size: [val_losses(settings, seed, window_bytes_of(meta, size), f"{folder}/{size}") for seed in range(options.seeds)]
            for size in (batches, *windows)
        }
    for size in windows:
        print(json.dumps({"claim": "two-level order", "window": size, "record_batches": batches, **compare(curves[size], curves[batches])}))


def val_losses(settings: list[str], seed: int, window_bytes: int, folder: str) -> list[float]:
    """The held-out loss at each validation of one training."""
    source.ActivationLoader = partial(ActivationLoader, window_bytes=window_bytes)
    config = load_config([*settings, f"seed={seed}", f"output_dir={folder}", f"run_name=seed{seed}", "wandb.mode=disabled"])
    train(config)
    return [line["val/loss"] for line in read_curve(config.run_dir / "metrics.jsonl") if "val/loss" in line]


def compare(windowed: list[list[float]], full: list[list[float]]) -> dict:
    """Mean and spread at each validation over the seeds, the widest of both."""
    looks = range(len(full[0]))
    loss = [statistics.mean(curve[look] for curve in full) for look in looks]
    differences = [statistics.mean(a[look] - b[look] for a, b in zip(windowed, full, strict=True)) / loss[look] for look in looks]
    spreads = [statistics.stdev(curve[look] for curve in full) / loss[look] for look in looks]
    mean = {"loss": loss[-1], "loss_windowed": statistics.mean(curve[-1] for curve in windowed)}
    figures = mean | {"difference": max(differences, key=abs), "spread": max(spreads)}
    return {"seeds": len(full), "validations": len(loss)} | {name: round(value, 5) for name, value in figures.items()}


if __name__ == "__main__":
    main()
