"""A rank that fails tells why, once; those that fail for want of it are silent, and all end with an exit code that is not 0."""

import sys

import pytest
from launched import DEEPSPEED, ROOT, TORCHRUN, free_port, run, run_ranks


def errors_of(said):
    """The lines in which processes tell of an error; torchrun's own report begins with a line of its logger."""
    return [line for line in said.partition("torch/distributed/elastic")[0].splitlines() if "Traceback" in line or "rror: " in line]


def fails(launcher, kind, rank):
    return errors_of(run(ROOT, [*launcher, "tests/failing_rank.py", kind, str(rank)], code=1).stderr)


@pytest.mark.parametrize("kind", ["expected", "everywhere"])
def test_error_is_told_once(kind):
    said = run_ranks(ROOT, 3, [sys.executable, "tests/failing_rank.py", kind, "2"], code=1)
    assert errors_of(said) == ["error: the disk is full of eels"]


def test_bug_under_deepspeed_keeps_the_traceback_of_its_rank_only():
    """Of rank 0, which holds what the others would ask."""
    command = [*DEEPSPEED, "2", "--master_port", str(free_port())]
    assert fails(command, "bug", 0) == ["[rank0]: Traceback (most recent call last):", "[rank0]: KeyError: 'a bug'"]


def test_killed_rank_is_missed_in_one_line():
    (line,) = fails([*TORCHRUN, "3"], "killed", 1)
    assert "of 3 has lost another process (" in line
    assert "(-9: killed" in line
