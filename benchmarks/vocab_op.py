"""Each fused vocabulary op beside what it replaces, forward and backward to the hidden states.

    python benchmarks/vocab_op.py [--op gumbel_embed vocab_log_prob] [--vocab 49152 131072] [--batch 8 64] [--dtype fp32 bf16]
                                  [--width 576] [--tied|--no-tied] [--repeats 9]

``gumbel_embed`` replaces ``F.gumbel_softmax(hidden @ W.T, hard=True) @ W`` at tau 1, and ``vocab_log_prob`` replaces
``F.cross_entropy(hidden @ W.T, ids)`` with the logits in float32. The logits have a language model's spread.

The sides take turns; figures are medians. Two kinds of memory: ``peak_mb``, what a fresh process's resident set rises above what it was
before the call (after one call at a small vocabulary, so that libraries and their buffers are in), and ``kept_mb``, what lies between
forward and backward beyond the arguments. ``build_seconds`` is the first use's compilation. ``ratio``, ``peak_ratio``, ``kept_ratio``:
ours / theirs. One JSON line per configuration.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from megalens.ops import gumbel_embed, native, noise_keys, vocab_log_prob

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("ours", "theirs")
OPS = ("gumbel_embed", "vocab_log_prob")


def main() -> None:
    """Measure every configuration asked for."""
    options = parse_arguments()
    configurations = list(itertools.product(options.op, options.vocab, options.batch, options.dtype))
    if options.side:
        print(json.dumps(memory(options.side, *configurations[0], options)))
        return
    started = time.perf_counter()
    native.library()
    built = time.perf_counter() - started
    for op, vocab, batch, dtype in configurations:
        line = {"claim": "vocab_op", "op": op, "vocab": vocab, "width": options.width, "batch": batch, "dtype": dtype, "tied": options.tied}
        line |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "build_seconds": round(built, 2)}
        line |= timings(op, vocab, batch, dtype, options)
        for side in SIDES:
            line |= {f"{name}_{side}": value for name, value in fresh_process(side, op, vocab, batch, dtype, options).items()}
        for name in ("peak", "kept"):
            line[f"{name}_ratio"] = round(line[f"{name}_mb_ours"] / line[f"{name}_mb_theirs"], 4)
        print(json.dumps(line), flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--side", choices=SIDES, help="only the memory of one side and configuration (used for the fresh processes)")
    return parser.parse_args()


def make(op: str, vocab: int, batch: int, dtype: str, options: argparse.Namespace) -> tuple[dict, torch.Tensor, set[int]]:
    """The forward function of each side, the hidden states, and where in memory the arguments lie."""
    draw, width = torch.Generator().manual_seed(0), options.width
    out_weight = (torch.randn(vocab, width, generator=draw) * 3 / width**0.5).to(DTYPES[dtype])
    in_weight = out_weight if options.tied else torch.randn(vocab, width, generator=draw).to(DTYPES[dtype])
    hidden = torch.randn(batch, width, generator=draw).to(DTYPES[dtype]).requires_grad_()
    keys, ids = noise_keys(0, 0, torch.arange(batch), 0), torch.randint(vocab, (batch,), generator=draw)
    forwards = {
        "gumbel_embed": {
            "ours": lambda: gumbel_embed(hidden, out_weight, in_weight, 1.0, keys, impl="tile").embeds,
            "theirs": lambda: F.gumbel_softmax(hidden @ out_weight.T, tau=1.0, hard=True) @ in_weight,
        },
        "vocab_log_prob": {
            "ours": lambda: vocab_log_prob(hidden, out_weight, ids, impl="tile").log_prob,
            "theirs": lambda: -F.cross_entropy((hidden @ out_weight.T).float(), ids, reduction="none"),
        },
    }
    return forwards[op], hidden, {t.untyped_storage().data_ptr() for t in (hidden, out_weight, in_weight, keys, ids)}


def timings(op: str, vocab: int, batch: int, dtype: str, options: argparse.Namespace) -> dict:
    """Medians of forward and backward, the sides in turns."""
    forwards, hidden, _ = make(op, vocab, batch, dtype, options)
    grad = torch.randn_like(forwards["ours"]().detach())
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(options.repeats + 2):
        for side in SIDES:
            started = time.perf_counter()
            torch.autograd.grad(forwards[side](), hidden, grad)
            if turn >= 2:
                seconds[side].append(time.perf_counter() - started)
        print(f"{op} V {vocab} B {batch} {dtype}: turn {turn + 1} of {options.repeats + 2}", file=sys.stderr)
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    return {"ratio": round(ratio, 3)} | {f"seconds_{side}": round(statistics.median(seconds[side]), 5) for side in SIDES}


def memory(side: str, op: str, vocab: int, batch: int, dtype: str, options: argparse.Namespace) -> dict:
    """Peak resident megabytes of forward and backward, and megabytes kept between them, of one side in this process."""
    make(op, 4200, batch, dtype, options)[0][side]().sum().backward()
    forwards, _, arguments = make(op, vocab, batch, dtype, options)
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


def fresh_process(side: str, op: str, vocab: int, batch: int, dtype: str, options: argparse.Namespace) -> dict:
    """:func:`memory` in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--op", op, "--vocab", str(vocab), "--batch", str(batch), "--dtype", dtype]
    command += ["--width", str(options.width), "--tied" if options.tied else "--no-tied"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
