"""What each rank of each engine holds in memory, how much it needs to get there, and whether tools/plan.py says so beforehand.

    python benchmarks/memory_ranks.py [--size tiny smol] [--modes frozen lora full] [--engines z3 fsdp] [--ranks 1 2] [--dtype bf16]

Tensors and allocations of PyTorch on the CPU are counted, not the processes' memory: the figures are the same on every machine. Maps of the
model's files, which take no memory of their own, do not count. Each configuration prints a JSON line, of the rank that holds most:

``held_mb``       all tensors as the second step's update begins: parameters, gradients, optimizer state, buffers of the engine
``ratio``         that, over what one process of the local engine holds
``spare_mb``      loading: the most there was at once, less what was there when the engine was ready
``largest_mb``    the largest block and the vocabulary, whole: what loading may have beside the shards
``planned``       held_mb as the planner has it, over held_mb
``peak_mb``       the most there was at once in the second step (on one rank: what other threads release is not seen)
``planned_peak``  the planner's total (without the GPU's own), over peak_mb

Exit code 1 when ZeRO-3 or FSDP2 on two ranks holds more than 0.55 of one process (z3_offload may: DeepSpeed keeps gradients twice on the
CPU), when loading into shards needs more than ``largest_mb``, or when the planner is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ENGINES = ("local", "z1", "z2", "z3", "z3_offload", "fsdp")
MODES = ("frozen", "lora", "full")
SIZES = {  # layer, context, tokens of an explanation, samples per rank
    "tiny": (3, 32, 4, 8),
    "smol": (19, 32, 4, 4),
}
SMOL = "data/models/SmolLM2-135M-Instruct"
MB = 1e6
SHARE, PLAN = 0.55, 0.1


def main(arguments: list[str]) -> int:
    """Launch the runs, compare them, print a line for each."""
    options = parse(arguments)
    if options.on_this_rank:
        run_rank(options)
        return 0
    wrong = 0
    for size in options.size:
        with tempfile.TemporaryDirectory() as place:
            prepare(Path(place), size)
            for mode in options.modes:
                for line in measure(Path(place), options, size, mode):
                    print(json.dumps(line), flush=True)
                    wrong += not line["kept"]
    return int(wrong > 0)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--model", default=SMOL, help="the folder of size smol's model")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--on-this-rank", help=argparse.SUPPRESS)  # what the launched processes are told
    return parser.parse_args(arguments)


def prepare(folder: Path, size: str) -> None:
    """The model, and DeepSpeed files whose buffers are no larger than models as small as these."""
    from megalens.tiny import make_model

    if size == "tiny":
        make_model(folder / "model", vocab_size=4096, num_hidden_layers=8, intermediate_size=256)
    for path in (ROOT / "ds_configs").glob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["zero_optimization"] |= {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
        if settings["zero_optimization"]["stage"] == 3:
            small = {"stage3_prefetch_bucket_size": 10_000, "sub_group_size": 10_000, "stage3_param_persistence_threshold": 0}
            settings["zero_optimization"] |= small
        (folder / path.name).write_text(json.dumps(settings), encoding="utf-8")


def measure(folder: Path, options: argparse.Namespace, size: str, mode: str) -> list[dict]:
    """The lines of a size and mode."""
    from megalens.planning import fit
    from megalens.planning.footprint import footprint

    fit.FILES = folder
    rows, found = SIZES[size][3], {}
    for ranks in sorted({1, *options.ranks}):
        for name in sorted({*(options.engines if ranks in options.ranks else ()), *(["local"] if ranks == 1 else ())}):
            found[name, ranks] = launch(folder, options, size, mode, ranks, name)
    step = footprint(configure(folder, options, size, mode, "local"))
    lines = []
    for (name, ranks), seen in found.items():
        if ranks not in options.ranks or name not in options.engines:
            continue
        planned = fit.need(configure(folder, options, size, mode, name), step, name, ranks, rows)
        line = {
            "claim": "memory per rank",
            "size": size,
            "mode": mode,
            "dtype": options.dtype,
            "engine": name,
            "ranks": ranks,
            "held_mb": round(seen["held"] / MB, 3),
            "ratio": round(seen["held"] / found["local", 1]["held"], 3),
            "spare_mb": round((seen["loading"] - seen["loaded"]) / MB, 3),
            "largest_mb": round(seen["largest"] / MB, 3),
            "planned": round((planned.held + planned.host) / seen["held"], 3),
        }
        if ranks == 1:
            line |= {"peak_mb": round(seen["peak"] / MB, 3), "planned_peak": round((planned.total + planned.host) / seen["peak"], 3)}
        kept = abs(line["planned"] - 1) <= PLAN and abs(line.get("planned_peak", 1) - 1) <= PLAN
        if name in ("z3", "z3_offload", "fsdp"):
            kept = kept and seen["loading"] - seen["loaded"] <= seen["largest"]
        if name in ("z3", "fsdp") and ranks == 2:
            kept = kept and line["ratio"] <= SHARE
        lines.append(line | {"kept": kept})
    return lines


def launch(folder: Path, options: argparse.Namespace, size: str, mode: str, ranks: int, engine: str) -> dict[str, int]:
    """What an engine needs on so many ranks, in processes that have run no other: of the rank that holds most."""
    arguments = ["--size", size, "--modes", mode, "--engines", engine, "--dtype", options.dtype, "--model", options.model]
    start(ranks, [*arguments, "--on-this-rank", str(folder)])
    seen = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return max(seen, key=lambda one: one["held"])


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


def run_rank(options: argparse.Namespace) -> None:
    """What one rank of a launch does."""
    import torch

    from megalens.engine import join_ranks, leave_ranks, rank_and_size

    torch.set_num_threads(1)
    folder, size = Path(options.on_this_rank), options.size[0]
    join_ranks(torch.device("cpu"))
    seen = run(configure(folder, options, size, options.modes[0], options.engines[0]), SIZES[size])
    (folder / f"rank-{rank_and_size()[0]}.json").write_text(json.dumps(seen), encoding="utf-8")
    leave_ranks()


def configure(folder: Path, options: argparse.Namespace, size: str, mode: str, name: str):
    """The configuration of a run."""
    from megalens.config import config_from_dict

    layer, context, t_text, rows = SIZES[size]
    engine = {"engine": "fsdp"} if name == "fsdp" else {} if name == "local" else {"deepspeed": str(folder / f"{name}.json")}
    loss = {"kl_base_weight": 0.5, "lm_base_weight": 0.5, "tail_say_weight": 1.0, "tail_read_weight": 1.0}
    settings = {"model_name": str(folder / "model") if size == "tiny" else options.model, "layer_l": layer, "t_text": t_text}
    settings |= {"device": "cpu", "dtype": options.dtype, "train_mode": mode, "activation_dumper": {"seq_len": context, "min_pos": 1}}
    settings |= {"batch_size": rows * int(os.environ.get("WORLD_SIZE", 1)), "lora": {"r": 4, "alpha": 4.0}}
    return config_from_dict(settings | loss | engine)


def run(config, size: tuple[int, ...]) -> dict[str, int]:
    """Build, shard and train for two steps; bytes at what points."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torch.profiler import ProfilerActivity, profile, record_function

    from megalens.engine import build_engine, shards_weights
    from megalens.families.loading import check_model
    from megalens.objective import Step, build_lens

    gc.freeze()  # what the libraries made when they were imported; looking through it at every count takes minutes
    width = check_model(config).hidden_size
    batch = make_batch(width, *size[1:])
    maps = {path.stat().st_size for path in Path(config.model_name).glob("*.safetensors")} if shards_weights(config) else ()
    held = 0

    def hold(*_) -> None:
        nonlocal held
        held = max(held, tensor_bytes())

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        with record_function("mark: load"):
            lens = build_lens(config, torch.zeros(width), torch.ones(width), empty_blocks=shards_weights(config))
            whole = largest(lens)
            engine = build_engine(config, lens, lens.parameter_groups())
        engine.train_step([batch], Step.fixed(config, 0, alpha_schedule=0.5))
        before = tensor_bytes()
        with record_function("mark: step"):
            engine.train_step([batch], Step.fixed(config, 1, alpha_schedule=0.5))
    hook = register_optimizer_step_pre_hook(hold)
    engine.train_step([batch], Step.fixed(config, 2, alpha_schedule=0.5))
    hook.remove()
    engine.close()
    marks, changes = {}, []
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) not in maps:
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith("mark: "):
            marks[event.name()] = event.start_ns(), event.end_ns()
    live, points, start = 0, {"loading": 0, "loaded": 0, "peak": 0}, None
    for time, change in sorted(changes):
        if time >= marks["mark: step"][0] and start is None:
            start = live - before  # what other threads allocated while loading was not seen
        live += change
        if time <= marks["mark: load"][1]:
            points["loading"], points["loaded"] = max(points["loading"], live), live
        if start is not None:
            points["peak"] = max(points["peak"], live - start)
    return points | {"held": held, "largest": whole}


def tensor_bytes() -> int:
    """Bytes of all tensors that there are."""
    import torch
    from torch.distributed.tensor import DTensor

    gc.collect()
    storages = {}
    for tensor in (found for found in gc.get_objects() if isinstance(found, torch.Tensor)):
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            part = part.to_local() if isinstance(part, DTensor) else part
            if part is not None and part.device.type == "cpu":
                storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


def largest(lens) -> int:
    """Bytes of the largest block (what is trained of it in float32), and of the vocabulary."""
    vocabulary, *units = lens.shard_units()

    def size(unit) -> int:
        parameters = {parameter for part in unit for parameter in part.parameters()}
        return sum(p.numel() * (4 if p.requires_grad else p.element_size()) for p in parameters)

    return max(map(size, units)) + size(vocabulary)


def make_batch(width: int, context: int, _, rows: int) -> dict:
    """A rank's samples of made-up contexts and activations."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return {
        "activation": torch.randn(rows, width, generator=draw) + 1,
        "input_ids": torch.randint(3, 400, (rows, context), generator=draw),
        "position": torch.full((rows,), context - 1),
        "sample_id": torch.arange(rows),
        "doc_id": torch.arange(rows),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
