"""What a training step costs, in units, and its peak memory, beside the plain reference step (no cache, whole patched forwards).

    python benchmarks/step.py [--size smol] [--batch 32] [--dtype fp32] [--terms full] [--vectors-per-sequence 1] [--repeats 5]

One unit is one no-gradient forward of the subject's blocks over batch x context tokens, in the same dtype, measured in the same run.
A step is forward, backward, clipping and AdamW: frozen base, projections and prompts trained; ``--terms full`` is MSE + KL + LM,
``--terms mse`` MSE alone. With ``--vectors-per-sequence k`` k rows are positions of one context and share its read. Without
``--dtype`` both are run. The three sides take turns; figures are medians. ``units_flops`` is what the step would cost if all its
floating-point operations ran as fast as the unit's. Peak memory is measured in a fresh process per side: peak resident set minus the
resident set after loading. Prints one JSON line per configuration.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

SIZES = {
    "tiny": {"model_name": None, "layer_l": 2, "t_text": 4, "batch": 8, "context": 32},
    "wide": {"model_name": None, "layer_l": 0, "t_text": 8, "batch": 32, "context": 64, "hidden_size": 576, "vocab_size": 131072},
    "smol": {"model_name": "data/models/SmolLM2-135M-Instruct", "layer_l": 19, "t_text": 8, "batch": 32, "context": 64},
}
SIDES = ("ours", "plain")


def main() -> None:
    """Measure every configuration asked for."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if options.side:
            print(json.dumps(peak_megabytes(options, folder)))
            return
        for dtype in [options.dtype] if options.dtype else ["fp32", "bf16"]:
            options.dtype = dtype
            figures = timings(options, folder) | {f"peak_mb_{side}": fresh_process(options, side) for side in options.sides}
            if len(options.sides) == 2:
                figures["peak_ratio"] = round(figures["peak_mb_ours"] / figures["peak_mb_plain"], 3)
            print(json.dumps(describe(options) | figures), flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smol")
    parser.add_argument("--batch", type=int, help="rows; default: the size's")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: one line for each")
    parser.add_argument("--terms", choices=["full", "mse"], default="full")
    parser.add_argument("--vectors-per-sequence", type=int, default=1, help="rows that share a context")
    parser.add_argument("--checkpoint", type=int, help="verbalizer.checkpoint_every_n_tokens")
    parser.add_argument("--compile", action="store_true", help="compile=true")
    parser.add_argument("--t-text", type=int, help="tokens of an explanation; default: the size's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=SIDES, help="leave the other side out")
    parser.add_argument(
        "--side",
        choices=[*SIDES, "naive"],
        help="only the peak memory of one side; naive: ours with plain vocabulary ops (benchmarks/memory.py)",
    )
    options = parser.parse_args()
    options.batch = options.batch or SIZES[options.size]["batch"]
    options.t_text = options.t_text or SIZES[options.size]["t_text"]
    options.sides = [options.only] if options.only else list(SIDES)
    return options


def make(options: argparse.Namespace, folder: str):
    """The lens, a batch, and the training step of a side."""
    import torch

    from megalens.config import Config, ConfigError
    from megalens.engine.local import LocalEngine
    from megalens.lens import verbalizer
    from megalens.objective import Step, build_lens, round_trip
    from megalens.objective.reference import ReferenceStep
    from megalens.ops import gumbel_embed, vocab_kl
    from megalens.tiny import make_model

    size = SIZES[options.size]
    wide = {"num_hidden_layers": 2, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    overrides = wide | {key: size[key] for key in ("hidden_size", "vocab_size")} if "vocab_size" in size else {}
    name = size["model_name"] or str(make_model(folder, **overrides))
    weights = {"kl_base_weight": 1.0, "lm_base_weight": 1.0} if options.terms == "full" else {}
    config = Config(model_name=name, layer_l=size["layer_l"], t_text=options.t_text, dtype=options.dtype, train_mode="frozen", **weights)
    config.verbalizer.checkpoint_every_n_tokens, config.compile = options.checkpoint, options.compile
    generator = torch.Generator().manual_seed(0)
    try:
        lens = build_lens(config, torch.zeros(_width(name)), torch.ones(_width(name)))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    rows, shared = torch.arange(options.batch), options.vectors_per_sequence
    position = size["context"] - 1 - rows % shared * (size["context"] // 2 // shared)
    ids = torch.randint(3, 500, (-(-options.batch // shared), size["context"]), generator=generator)[rows // shared]
    batch = {
        "input_ids": ids.masked_fill(torch.arange(size["context"]) > position[:, None], 0),
        "position": position,
        "sample_id": rows,
        "doc_id": rows // shared,
    }
    batch["activation"] = lens.subject.read(batch["input_ids"], batch["position"]).activation_BD.float()
    engine = LocalEngine(config, lens, lens.parameter_groups())
    at = Step.fixed(config, alpha_schedule=1.0)
    modules = {"ours": lens, "naive": lens, "plain": ReferenceStep(lens)}
    if options.side == "naive":
        verbalizer.gumbel_embed, round_trip.vocab_kl = partial(gumbel_embed, impl="reference"), partial(vocab_kl, impl="reference")

    def step(side: str) -> None:
        engine.module = modules[side]
        engine.train_step([batch], at)

    return lens, batch, step


def _width(model_name: str) -> int:
    path = Path(model_name) / "config.json"
    return json.loads(path.read_text())["hidden_size"] if path.is_file() else 0


def timings(options: argparse.Namespace, folder: str) -> dict:
    """Medians of the unit and of both steps, taken in turns."""
    import torch

    lens, batch, step = make(options, folder)
    lm, positions = lens.subject.lm, torch.arange(batch["input_ids"].shape[1])[None]

    @torch.no_grad()
    def unit() -> None:
        lm.run(lm.enter(lm.embed(batch["input_ids"]), positions), 0, lens.subject.num_blocks, positions)

    sides = {"unit": unit} | {side: partial(step, side) for side in options.sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.repeats + 2):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
        print(f"{options.size} {options.dtype}: turn {turn + 1} of {options.repeats + 2}", file=sys.stderr)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {"seconds_unit": round(median["unit"], 4)}
    names = {"ours": ("units", "seconds_ours"), "plain": ("units_plain", "seconds_theirs")}
    for side in options.sides:
        units, spent = names[side]
        figures |= {units: round(median[side] / median["unit"], 2), spent: round(median[side], 4)}
    if "ours" in sides and not options.compile:
        figures["units_flops"] = round(flops(sides["ours"]) / flops(unit), 2)
    if len(options.sides) == 2:
        figures["ratio"] = round(statistics.median(a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)), 3)
    return figures


def flops(work: Callable[[], None]) -> int:
    """Floating-point operations of the matrix products and the attention in ``work``, the vocabulary ops' included."""
    from torch.utils.flop_counter import FlopCounterMode

    from megalens.planning.flops import FLOPS

    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        work()
    return counter.get_total_flops()


def fresh_process(options: argparse.Namespace, side: str) -> float:
    """The side's peak memory in a process of its own."""
    given = {"size", "batch", "dtype", "terms", "vectors_per_sequence", "checkpoint", "t_text"}
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name in given and value is not None]
    command = [sys.executable, __file__, *settings, *(["--compile"] if options.compile else [])]
    done = subprocess.run([*command, "--side", side], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def peak_megabytes(options: argparse.Namespace, folder: str) -> dict:
    """Peak resident set of two steps minus the resident set after loading, in MB (Linux), and the vocabulary's size."""
    lens, _, step = make(options, folder)
    status = Path("/proc/self/status").read_text().split()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = int(status[status.index("VmRSS:") + 1])
    for _ in range(2):
        step(options.side)
    status = Path("/proc/self/status").read_text().split()
    peak = round((int(status[status.index("VmHWM:") + 1]) - before) / 1024, 1)
    return {"peak_mb": peak, "vocabulary": len(lens.subject.lm.vocabulary.out_weight)}


def describe(options: argparse.Namespace) -> dict:
    """What was measured, and with what."""
    import torch
    import transformers

    size = SIZES[options.size]
    return {
        "claim": f"training step, {options.terms} terms, frozen base",
        "size": options.size,
        "batch": options.batch,
        "context": size["context"],
        "t_text": options.t_text,
        "vectors_per_sequence": options.vectors_per_sequence,
        "checkpoint_every_n_tokens": options.checkpoint,
        "compile": options.compile,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
