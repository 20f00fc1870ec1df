"""Bayesian search against random search on a fixed synthetic objective, and what successive halving spends.

    python benchmarks/sweep_search.py
    python benchmarks/sweep_search.py --seeds 3 --trials 12

The objective has the shape of a learning-rate sweep: a bowl over the logarithm of the learning rate, a slope over the batch size; with
halving, a trial's curve falls towards it. No training runs. One JSON line per claim; both searches are the ones of tools/sweep_offline.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

from optuna.trial import TrialState

from megalens.sweep.file import COMMAND, Halving, Range, SweepFile
from megalens.sweep.search import Search

LOOKS = 40  # values of the metric in a whole training, as in sweeps/random_hyperband.yaml


def objective(point: dict) -> float:
    """Smallest, 0, at learning_rate 2e-4 and batch_size 64."""
    return (math.log10(point["learning_rate"]) + 3.7) ** 2 + 0.1 * abs(math.log2(point["batch_size"] / 64))


def sweep(method: str, halving: Halving | None = None) -> SweepFile:
    """The sweep over :func:`objective`."""
    choices, ranges = {"batch_size": [16, 32, 64, 128]}, {"learning_rate": Range(1e-5, 1e-3, log=True)}
    return SweepFile("synthetic", "", method, COMMAND, "val/loss", False, None, halving, {}, choices, ranges)


def best_of(method: str, seed: int, trials: int) -> float:
    """The best value that a search finds."""
    with tempfile.TemporaryDirectory() as folder:
        search = Search(sweep(method), Path(folder), trials, seed)
        while claim := search.claim():
            claim.end(TrialState.COMPLETE, objective(claim.point))
        return search.best().value


def spent(seed: int, trials: int, halving: Halving) -> tuple[float, float]:
    """(share of the whole random search's looks that halving takes, the best value it finds)."""
    with tempfile.TemporaryDirectory() as folder:
        search, looks = Search(sweep("random", halving), Path(folder), trials, seed), 0
        while claim := search.claim():
            look, state = halving.min_iter, TrialState.COMPLETE
            while look < LOOKS and state == TrialState.COMPLETE:
                if claim.is_hopeless(look, objective(claim.point) + 1 / look):
                    state = TrialState.PRUNED
                else:
                    look *= halving.eta
            looks += min(look, LOOKS)
            claim.end(state, objective(claim.point))
        return looks / (trials * LOOKS), search.best().value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=20)
    args = parser.parse_args()
    found = {method: [] for method in ("random", "bayes")}
    shares, best = [], []
    for seed in range(args.seeds):
        for method in found:
            found[method].append(best_of(method, seed, args.trials))
        share, value = spent(seed, args.trials, Halving(3, 2))
        shares.append(share)
        best.append(value)
        print(f"seed {seed}: random {found['random'][-1]:.5f}, bayes {found['bayes'][-1]:.5f}, halving {share:.2f}", file=sys.stderr)
    about = {"seeds": args.seeds, "trials": args.trials}
    wins = sum(b < r for b, r in zip(found["bayes"], found["random"], strict=True))
    medians = {f"{method}_median": statistics.median(values) for method, values in found.items()}
    print(json.dumps({"claim": "bayesian search finds better points than random search", **about, **medians, "wins": wins}))
    halving = {"share_largest": max(shares), "share_mean": statistics.mean(shares), "halving_median": statistics.median(best)}
    print(json.dumps({"claim": "hyperband spends at most half of the steps of the random search", **about, **halving}))


if __name__ == "__main__":
    main()
