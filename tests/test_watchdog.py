"""A training that hangs ends in bounded time, and its one line names the rank and the step."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def test_hung_rank_ends_all_and_is_named_with_its_step():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode for process in ranks)
    lines = [line for line in "".join(errors).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert "stall_seconds=2" in lines[0]
    assert "rank 1: micro-step 2" in lines[0] and "<module>" in lines[0].split("rank 1")[1].split(";")[0]
    assert "rank 0: micro-step 2" in lines[0] and "barrier" in lines[0]
