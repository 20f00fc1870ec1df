"""Run under torchrun by test_engine.py: the same training on every engine, on this many ranks; rank 0 writes what it saw as JSON.

torchrun --nproc_per_node 2 tests/engine_ranks.py FOLDER
"""

import json
import math
import sys
from pathlib import Path

import torch
from test_engine import GROUPS, NAMES, At, FakeLens, make_batch

from megalens.config import Config, Fsdp
from megalens.engine import build_engine, join_ranks, leave_ranks
from megalens.engine.state import OptimizerState

ROOT = Path(__file__).resolve().parents[1]
STAGES = [None, "z1", "z2", "z3", "z3_offload", "fsdp", "fsdp_offload"]
SPOILT = {3: math.nan, 4: 1e12}  # these updates have a loss that is not finite, or an absurd gradient, on one rank


def make_engine(stage, dtype, weights=None, optimizer="adamw"):
    torch.manual_seed(0)
    module = FakeLens(torch.bfloat16 if dtype == "bf16" else torch.float32)
    config = Config(device="cpu", dtype=dtype, batch_size=8, gradient_accumulation_steps=2)
    if stage is not None and stage.startswith("fsdp"):
        config.engine, config.fsdp = "fsdp", Fsdp(offload=stage == "fsdp_offload")
    elif stage is not None:
        config.deepspeed = str(ROOT / "ds_configs" / f"{stage}.json")
    config.learning_rate, config.weight_decay, config.optimizer = 0.01, 0.1, optimizer
    if weights:
        with torch.no_grad():
            for name, value in weights.items():
                dict(module.named_parameters())[name].copy_(value)
    return build_engine(config, module, module.parameter_groups(), weights)


def share(batch, engine):
    rows = 8 // engine.world_size
    return {name: value[engine.rank * rows : (engine.rank + 1) * rows] for name, value in batch.items()}


def step(engine, update, resting=None):
    spoil = [0.0] * 7 + [SPOILT.get(update, 0.0)]  # only the last rank sees it
    batches = [make_batch(2 * update + i, 8) | {"spoil": torch.tensor(spoil)} for i in range(2)]
    engine.set_rates({group: 0.0 if group == resting else 0.005 for group in GROUPS})
    return engine.train_step([share(batch, engine) for batch in batches], At(update))


def run(stage, dtype, folder):
    """Seven updates; after the third, the state is saved for :func:`go_on`."""
    engine, metrics = make_engine(stage, dtype), []
    if stage == "z3" and dtype == "fp32":  # the optimizer steps on the shards themselves
        flats = engine.sharded.fp16_partitioned_groups_flat
        assert [p.data_ptr() for p in engine._partitions()] == [flat.data_ptr() for flat in flats]
    for update in range(7):
        if update == 3:
            saved = engine.full_state(NAMES)
            engine.optimizer_part().write(folder, "optimizer")
            engine.barrier()
        metrics.append(step(engine, update))
    return finish(engine, metrics), (saved if engine.is_main else None)


def go_on(stage, dtype, folder, weights):
    """The last four updates, from what another engine saved."""
    engine = make_engine(stage, dtype, weights)
    engine.load_state(OptimizerState(folder))
    return finish(engine, [step(engine, update) for update in range(3, 7)])


def rest(stage, folder):
    """Two updates while the head rests and one more with it; what the optimizer has of it before, and its state for :func:`wake`."""
    engine = make_engine(stage, "fp32")
    start = engine.full_state(NAMES)
    metrics = [step(engine, update, "head") for update in range(2)]
    saved = engine.full_state(NAMES)
    part = engine.optimizer_part()
    part.write(folder, "resting")
    moved = {name: not torch.equal(saved[name], start[name]) for name in saved}
    of_head = {key: value.abs().sum().item() for key, value in part.tensors.items() if "head" in key}
    taken = {name: engine.steps_taken(name) for name in NAMES}
    seen = finish(engine, [*metrics, step(engine, 2)])
    return seen | {"moved": moved, "of_head": of_head, "taken": taken}, saved


def wake(stage, folder, weights):
    """The third update of :func:`rest`, from what another engine saved."""
    engine = make_engine(stage, "fp32", weights)
    engine.load_state(OptimizerState(folder, stem="resting"))
    return finish(engine, [step(engine, 2)])


def finish(engine, metrics):
    weights = {name: value.tolist() for name, value in engine.full_state(NAMES).items()}
    engine.close()
    return {"metrics": metrics, "weights": weights}


def main(folder: Path) -> None:
    join_ranks(torch.device("cpu"))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    seen = {}
    for dtype in ("fp32", "bf16"):
        for stage in STAGES:
            place = folder / f"{dtype}-{stage}-{world}"
            place.mkdir(exist_ok=True)
            seen[f"{dtype} {stage}"], weights = run(stage, dtype, place)
            if dtype == "fp32":
                engine = make_engine(stage, dtype, optimizer="sgd")
                seen[f"sgd {stage}"] = finish(engine, [step(engine, update) for update in range(4)])
                weights = [weights]
                if world > 1:
                    torch.distributed.broadcast_object_list(weights)
                following = STAGES[(STAGES.index(stage) + 1) % len(STAGES)]
                seen[f"{stage} then {following}"] = go_on(following, dtype, place, weights[0])
                seen[f"rest {stage}"], weights = rest(stage, place)
                weights = [weights]
                if world > 1:
                    torch.distributed.broadcast_object_list(weights)
                seen[f"{stage} woken by {following}"] = wake(following, place, weights[0])
    if rank == 0:
        (folder / f"seen-{world}.json").write_text(json.dumps(seen))
    leave_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
