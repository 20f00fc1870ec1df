"""The fused vocabulary op beside ``F.gumbel_softmax(hidden @ W.T, hard=True) @ W``, forward and backward to the hidden states.

    python benchmarks/vocab_op.py [--vocab 49152 131072] [--batch 8 64] [--dtype fp32 bf16] [--width 576] [--tied|--untied] [--repeats 9]

Logits have a language model's spread, tau is 1. The sides take turns; figures are medians. Two kinds of memory: ``peak_mb``, what a
fresh process's resident set rises above what it was before the call (after one call at a small vocabulary, so that libraries and their
buffers are in), and ``kept_mb``, what lies between forward and backward beyond the arguments. ``build_seconds`` is the first use's
compilation. ``ratio``, ``peak_ratio``, ``kept_ratio``: ours / theirs. One JSON line per configuration.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from megalens.ops import gumbel_embed, native, noise_keys

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("ours", "theirs")


def main() -> None:
    """Measure every configuration asked for."""
    options = parse_arguments()
    if options.side:
        print(json.dumps(memory(options.side, options.vocab[0], options.batch[0], options.dtype[0], options.width, options.tied)))
        return
    started = time.perf_counter()
    native.library()
    built = time.perf_counter() - started
    for vocab in options.vocab:
        for batch in options.batch:
            for dtype in options.dtype:
                line = {"claim": "vocab_op", "vocab": vocab, "width": options.width, "batch": batch, "dtype": dtype, "tied": options.tied}
                line |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "build_seconds": round(built, 2)}
                line |= timings(vocab, batch, dtype, options)
                for side in SIDES:
                    line |= {f"{name}_{side}": value for name, value in fresh_process(side, vocab, batch, dtype, options).items()}
                for name in ("peak", "kept"):
                    line[f"{name}_ratio"] = round(line[f"{name}_mb_ours"] / line[f"{name}_mb_theirs"], 4)
                print(json.dumps(line), flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--side", choices=SIDES, help="only the memory of one side and configuration (used for the fresh processes)")
    return parser.parse_args()


def make(vocab: int, batch: int, dtype: str, width: int, tied: bool) -> tuple[dict, torch.Tensor, set[int]]:
    """The forward function of each side, the hidden states, and where in memory the arguments lie."""
    draw = torch.Generator().manual_seed(0)
    out_weight = (torch.randn(vocab, width, generator=draw) * 3 / width**0.5).to(DTYPES[dtype])
    in_weight = out_weight if tied else torch.randn(vocab, width, generator=draw).to(DTYPES[dtype])
    hidden = torch.randn(batch, width, generator=draw).to(DTYPES[dtype]).requires_grad_()
    keys = noise_keys(0, 0, torch.arange(batch), 0)
    forwards = {
        "ours": lambda: gumbel_embed(hidden, out_weight, in_weight, 1.0, keys, impl="tile").embeds,
        "theirs": lambda: F.gumbel_softmax(hidden @ out_weight.T, tau=1.0, hard=True) @ in_weight,
    }
    return forwards, hidden, {t.untyped_storage().data_ptr() for t in (hidden, out_weight, in_weight, keys)}


def timings(vocab: int, batch: int, dtype: str, options: argparse.Namespace) -> dict:
    """Medians of forward and backward, the sides in turns."""
    forwards, hidden, _ = make(vocab, batch, dtype, options.width, options.tied)
    grad = torch.randn(hidden.shape).to(hidden.dtype)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(options.repeats + 2):
        for side in SIDES:
            started = time.perf_counter()
            torch.autograd.grad(forwards[side](), hidden, grad)
            if turn >= 2:
                seconds[side].append(time.perf_counter() - started)
        print(f"V {vocab} B {batch} {dtype}: turn {turn + 1} of {options.repeats + 2}", file=sys.stderr)
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    return {"ratio": round(ratio, 3)} | {f"seconds_{side}": round(statistics.median(seconds[side]), 5) for side in SIDES}


def memory(side: str, vocab: int, batch: int, dtype: str, width: int, tied: bool) -> dict:
    """Peak resident megabytes of forward and backward, and megabytes kept between them, of one side in this process."""
    make(4200, batch, dtype, width, tied)[0][side]().sum().backward()
    forwards, _, arguments = make(vocab, batch, dtype, width, tied)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in arguments:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no one's memory now
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    forwards[side]().sum().backward()
    peak = resident("VmHWM") - before
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forwards[side]()
    del result
    return {"peak_mb": round(peak / 1024, 3), "kept_mb": round(sum(kept.values()) / 2**20, 4)}


def resident(name: str) -> int:
    """A line of ``/proc/self/status``, in KiB."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def fresh_process(side: str, vocab: int, batch: int, dtype: str, options: argparse.Namespace) -> dict:
    """:func:`memory` in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--vocab", str(vocab), "--batch", str(batch), "--dtype", dtype]
    command += ["--width", str(options.width), "--tied" if options.tied else "--no-tied"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
