"""Every engine computes the same run: one config, seed and global batch on each engine and number of ranks, beside one process.

    python benchmarks/parity.py [--optimizers sgd,adamw] [--modes frozen,lora,full] [--engines local,z3,fsdp] [--steps 20] [--json FILE]
        [--terms soft]

A tiny random Llama in fp32, every loss term on (with --terms soft those on soft text and tails alone), on CPUs over gloo. In a cell: the
largest relative difference of a step's loss; the largest difference of a final weight tensor relative to its norm; that of a single
weight relative to the largest of its tensor. Collectives are counted per optimizer step (FSDP's own too, DeepSpeed's not). Exit code 1
when a loss differs by more than 1e-5 (1e-4 under AdamW) or a tensor by more than 1e-4. Single weights are only shown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

Mode = tuple[str, str]  # optimizer and train_mode
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODES = ("frozen", "lora", "full")
RUNS = {  # number of ranks: engines
    1: ["local"],
    2: ["local", "z0", "z1", "z2", "z3", "z3_offload", "fsdp", "fsdp_gathered", "fsdp_offload", "fsdp_tensor"],
    3: ["local", "z3", "fsdp"],
    4: ["fsdp_hybrid", "fsdp_tensor"],
}
BATCH, CONTEXT, VOCABULARY, TOKENS = 24, 16, 500, 3
LOSS, WEIGHTS = {"sgd": 1e-5, "adamw": 1e-4}, 1e-4  # largest relative differences
LEARNING_RATE = {"sgd": 1e-2, "adamw": 1e-3}


def main(arguments: list[str]) -> int:
    """Launch the runs, compare them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default=",".join(LEARNING_RATE))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--engines", default=",".join(sorted({name for names in RUNS.values() for name in names})))
    parser.add_argument("--ranks", default=",".join(map(str, RUNS)), help="numbers of ranks (1 is always run)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--terms", choices=("all", "soft"), default="all")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--on-this-rank", help=argparse.SUPPRESS)  # what the launched processes are told
    options = parser.parse_args(arguments)
    modes, engines = list(product(options.optimizers.split(","), options.modes.split(","))), options.engines.split(",")
    if options.on_this_rank:
        run_rank(Path(options.on_this_rank), modes, engines, options.steps, options.terms)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for ranks in sorted({1, *map(int, options.ranks.split(","))}):
            chosen = [name for name in RUNS[ranks] if name in engines] if ranks > 1 else ["local"]
            if chosen:
                launch(folder, ranks, options, chosen)
        for mode in modes:
            alone = read(folder, 1, mode, "local")
            for ranks, names in RUNS.items():
                rows += [compare(folder, ranks, mode, name, alone) for name in names if (folder / label(ranks, mode, name)).is_dir()]
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["loss"] > LOSS[row["optimizer"]] or row["weights"] > WEIGHTS for row in rows))


def label(ranks: int, mode: Mode, engine: str) -> str:
    """The folder of a run."""
    return "-".join([*mode, engine, str(ranks)])


def prepare(folder: Path) -> None:
    """The model, and DeepSpeed files for a model as small as this one."""
    from megalens.tiny import make_model

    make_model(folder / "model")
    for path in (ROOT / "ds_configs").glob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["zero_optimization"]["stage"] == 3:  # which else keeps parameters of fewer than 100,000 numbers whole
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / path.name).write_text(json.dumps(settings), encoding="utf-8")
    (folder / "z0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}), encoding="utf-8")


def launch(folder: Path, ranks: int, asked: argparse.Namespace, engines: list[str]) -> None:
    """All runs of a number of ranks in one launch."""
    options = ["--optimizers", asked.optimizers, "--modes", asked.modes, "--engines", ",".join(engines)]
    options += ["--steps", str(asked.steps), "--terms", asked.terms, "--on-this-rank", str(folder)]
    start(ranks, options)


def start(ranks: int, arguments: list[str]) -> None:
    """Run this script on so many ranks.

    Raises:
        SystemExit: one failed, with its error.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *launcher, __file__, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: the run on {ranks} ranks failed:\n{done.stderr[-3000:]}")


def run_rank(folder: Path, modes: list[Mode], engines: list[str], steps: int, terms: str) -> None:
    """What one rank of a launch does: each run in turn."""
    import torch

    from megalens.engine import join_ranks, leave_ranks

    torch.set_num_threads(1)
    join_ranks(torch.device("cpu"))
    for mode in modes:
        for name in engines:
            run(folder, mode, name, steps, terms)
            gc.collect()
    leave_ranks()


def run(folder: Path, mode: Mode, name: str, steps: int, terms: str) -> None:
    """One training; rank 0 writes its losses and final weights."""
    import torch

    from megalens.engine import build_engine, data_share, rank_and_size, shards_weights
    from megalens.files import save_json, save_tensors
    from megalens.objective import Step, build_lens

    rank, ranks = rank_and_size()
    config, draw = configure(folder, mode, name, terms), torch.Generator().manual_seed(0)
    mean, var = torch.randn(64, generator=draw), torch.rand(64, generator=draw) + 0.5
    lens = build_lens(config, mean, var, empty_blocks=shards_weights(config))
    engine = build_engine(config, lens, lens.parameter_groups())
    losses = []
    for update in range(steps):
        batches, at = [share(make_batch(draw), *data_share(config)) for _ in range(2)], Step.fixed(config, update, alpha_schedule=0.5)
        losses.append(engine.train_step(batches, at, engine.sample(batches, at))["loss"])
    weights = engine.full_state(lens.lens_state_names())
    calls = {kind: count // steps for kind, count in engine.traffic.calls.items()}
    engine.close()
    if rank == 0:
        place = folder / label(ranks, mode, name)
        place.mkdir()
        save_tensors(place / "lens.safetensors", weights)
        save_json(place / "run.json", {"losses": losses, "collectives": calls})


def configure(folder: Path, mode: Mode, name: str, terms: str):
    """The configuration of a run."""
    from megalens.config import config_from_dict

    engine = {"engine": "fsdp"} if name.startswith("fsdp") else {} if name == "local" else {"deepspeed": str(folder / f"{name}.json")}
    extra = {
        "fsdp_hybrid": {"fsdp": {"shard_ranks": 2}},
        "fsdp_offload": {"fsdp": {"offload": True}},
        "fsdp_gathered": {"fsdp": {"gather_gb": 1.0}},
        "fsdp_tensor": {"fsdp": {"tensor_ranks": 2}},
    }
    loss = {"kl_base_weight": 0.5, "lm_base_weight": 0.5, "tail_say_weight": 1.0, "tail_read_weight": 1.0, "entropy_weight": 0.01}
    if terms == "all":
        names = ("policy", "imitate", "rollout_read", "reference_kl", "say", "read")
        loss |= {"terms": dict.fromkeys(names, 0.5), "rollouts": {"draws": 2}}
        loss |= {"given": {"path": "made up.jsonl"}, "tail_order": "forward"}  # its texts are in the batches
    settings = {"model_name": str(folder / "model"), "layer_l": 1, "t_text": TOKENS, "device": "cpu", "dtype": "fp32"}
    settings |= {"batch_size": BATCH, "gradient_accumulation_steps": 2, "lora": {"r": 4, "alpha": 4.0}}
    settings |= {"optimizer": mode[0], "learning_rate": LEARNING_RATE[mode[0]], "train_mode": mode[1]}
    return config_from_dict(settings | loss | engine | extra.get(name, {}))


def make_batch(draw) -> dict:
    """A global batch of made-up contexts and activations."""
    import torch

    return {
        "activation": torch.randn(BATCH, 64, generator=draw) + 1,
        "input_ids": torch.randint(3, VOCABULARY, (BATCH, CONTEXT), generator=draw),
        "position": torch.randint(6, CONTEXT, (BATCH,), generator=draw),
        "sample_id": torch.randint(0, 10**6, (BATCH,), generator=draw),
        "doc_id": torch.arange(BATCH),
        "text_ids": torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=draw),
        "text_length": torch.randint(1, TOKENS + 1, (BATCH,), generator=draw),
    }


def share(batch: dict, rank: int, ranks: int) -> dict:
    """A rank's rows of it."""
    size = BATCH // ranks
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def read(folder: Path, ranks: int, mode: Mode, name: str) -> dict:
    """What a run wrote."""
    from safetensors.torch import load_file

    place = folder / label(ranks, mode, name)
    return json.loads((place / "run.json").read_text(encoding="utf-8")) | {"weights": load_file(str(place / "lens.safetensors"))}


def compare(folder: Path, ranks: int, mode: Mode, name: str, alone: dict) -> dict:
    """A row of the table."""
    found = read(folder, ranks, mode, name)
    weights = found["weights"]
    return {
        "optimizer": mode[0],
        "mode": mode[1],
        "engine": name,
        "ranks": ranks,
        "loss": max(abs(a - b) / abs(b) for a, b in zip(found["losses"], alone["losses"], strict=True)),
        "weights": max(((weights[n] - w).norm() / w.norm().clamp_min(1e-12)).item() for n, w in alone["weights"].items()),
        "single": max(((weights[n] - w).abs().max() / w.abs().max().clamp_min(1e-12)).item() for n, w in alone["weights"].items()),
        "collectives": found["collectives"],
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown: a line for each engine on a number of ranks, a column for each optimizer and mode."""
    modes = list(dict.fromkeys(f"{row['optimizer']} {row['mode']}" for row in rows))
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(f"{row['engine']} | {row['ranks']}", {})[f"{row['optimizer']} {row['mode']}"] = row
    lines = [f"| engine | ranks | {' | '.join(modes)} | collectives |", "|---" * (len(modes) + 3) + "|"]
    for engine, by_mode in found.items():
        cells = [" ".join(f"{by_mode[mode][name]:.0e}" for name in ("loss", "weights", "single")) for mode in modes]
        calls = sorted({sum(row["collectives"].values()) for row in by_mode.values()})
        lines.append(f"| {engine} | {' | '.join(cells)} | {'-'.join(map(str, [calls[0], *calls[1:][-1:]]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
