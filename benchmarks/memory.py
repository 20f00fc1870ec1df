"""How the peak memory of a training step grows with the length of the explanation, fused beside naive.

    python benchmarks/memory.py [--size smol] [--size wide] [--t-text 8 16 32 64] [--batch 8]

Each point is a fresh process of ``benchmarks/step.py``: peak resident set of two steps (MSE + KL + LM, fp32, frozen base) minus the
resident set after loading. ``mb_per_token`` is the slope of a straight line through the points, ``bend`` how far the last segment's slope
is from the first's (1: straight), and ``vocabulary_mb`` what one ``[batch, V]`` row of float32 would take: a step that kept one per token
would have at least that slope. Prints one JSON line per size and kind (``naive``, ``fused``, ``checkpointed``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

STEP = Path(__file__).with_name("step.py")
KINDS = {"naive": ["--side", "naive"], "fused": ["--side", "ours"], "checkpointed": ["--side", "ours", "--checkpoint", "1"]}


def main() -> None:
    """Measure every size and kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=["tiny", "smol", "wide"], default=["smol", "wide"])
    parser.add_argument("--t-text", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    if len(options.t_text) < 2:
        parser.error("--t-text: a slope needs two lengths or more")
    points = [(size, kind) for size in options.size for kind in options.kind]
    with tqdm(total=len(points) * len(options.t_text), desc="memory", unit="run") as bar:
        for size, kind in points:
            found = []
            for t_text in sorted(options.t_text):
                found.append(measure(size, kind, t_text, options.batch))
                bar.update()
            tqdm.write(json.dumps(describe(size, kind, sorted(options.t_text), found, options.batch)), file=sys.stdout)


def measure(size: str, kind: str, t_text: int, batch: int) -> dict:
    """One point."""
    command = [sys.executable, str(STEP), "--size", size, "--dtype", "fp32", "--batch", str(batch), "--t-text", str(t_text), *KINDS[kind]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def describe(size: str, kind: str, lengths: list[int], found: list[dict], batch: int) -> dict:
    """A line of the report."""
    peaks = [each["peak_mb"] for each in found]
    slopes = [(b - a) / (t - s) for a, b, s, t in zip(peaks, peaks[1:], lengths, lengths[1:], strict=False)]
    return {
        "claim": "memory of a step by length",
        "size": size,
        "kind": kind,
        "batch": batch,
        "t_text": lengths,
        "peak_mb": peaks,
        "mb_per_token": round((peaks[-1] - peaks[0]) / (lengths[-1] - lengths[0]), 2),
        "bend": round(slopes[-1] / slopes[0], 2) if slopes[0] > 0 else None,
        "vocabulary_mb": round(batch * found[0]["vocabulary"] * 4 / 2**20, 2),
    }


if __name__ == "__main__":
    main()
