"""A training that hangs ends in bounded time, and its one line names the rank and the step."""

import sys

import quick
from launched import environment, free_port

RANK = """
import sys, time, torch
from megalens.engine import join_ranks
from megalens.training.watchdog import Watchdog
join_ranks(torch.device("cpu"))
with Watchdog(2.0) as watchdog:
    for step in range(3):
        watchdog.at(f"micro-step {step}")
        torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        time.sleep(600)
    torch.distributed.barrier()
"""


def test_hung_rank_ends_all_and_is_named_with_its_step(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    shared = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
    ranks = [quick.Started([sys.executable, "rank.py"], tmp_path, shared | {"RANK": str(rank)}) for rank in (0, 1)]
    assert all(rank.wait() for rank in ranks)
    errors = [rank.printed()[1] for rank in ranks]
    lines = [line for line in "".join(errors).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert "stall_seconds=2" in lines[0]
    assert "rank 1: micro-step 2" in lines[0] and "<module>" in lines[0].split("rank 1")[1].split(";")[0]
    assert "rank 0: micro-step 2" in lines[0] and "barrier" in lines[0]
