"""The Triton versions without a GPU: equal to the reference in Triton's interpreter, and compiled ahead of time for three chips."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
KERNELS = ("gumbel statistics", "gumbel factors", "log_prob sums", "log_prob gradient")
ROOT = Path(__file__).parent.parent


def run(*command: str, **variables: str) -> str:
    """What a fresh Python process prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])} | variables
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_equal_the_reference_in_the_interpreter():
    printed = run("-m", "pytest", "-q", "-o", "addopts=", "tests/kernels_in_interpreter.py", TRITON_INTERPRET="1")
    assert "40 passed" in printed, printed


def test_ahead_of_time_for_three_chips_without_spills_and_within_shared_memory():
    printed = run("benchmarks/kernel_resources.py", "--rows", "8", "64", "--dtype", "bf16")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert {(line["kernel"], line["arch"]) for line in lines} == {(k, a) for k in KERNELS for a in (80, 90, 100)}
    for line in lines:
        assert line["stack"] == 0 and line["local"] == 0, line  # a spill lies in either
        assert 0 < line["reg"] <= 255 and 0 < line["shared"] <= line["shared_limit"], line
