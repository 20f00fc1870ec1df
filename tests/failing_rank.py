"""Run under a launcher by test_failure.py: ranks that add numbers until one fails.

torchrun --nproc_per_node 3 tests/failing_rank.py expected|bug|killed|everywhere RANK
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from megalens import cli  # noqa: E402
from megalens.engine import EngineError, join_ranks  # noqa: E402
from megalens.engine.failure import told_once  # noqa: E402


def main(arguments):
    kind, failing = [argument for argument in arguments if not argument.startswith("--")]
    with told_once():
        join_ranks(torch.device("cpu"))
        rank = torch.distributed.get_rank()
        for step in range(5):
            if step == 3 and (rank == int(failing) or kind == "everywhere"):
                fail(kind)
            torch.distributed.all_reduce(torch.ones(1))


def fail(kind):
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise KeyError("a bug") if kind == "bug" else EngineError("the disk is full of eels")


if __name__ == "__main__":
    cli.run(main, __doc__)
