"""A rank that fails tells why, once; those that fail for want of it are silent, and all end with an exit code that is not 0."""

import pytest
from launched import DEEPSPEED, ROOT, TORCHRUN, free_port, run


def fails(launcher, kind, rank):
    """The lines in which its processes tell of an error; torchrun's own report begins with a line of its logger."""
    done = run(ROOT, [*launcher, "tests/failing_rank.py", kind, str(rank)], code=1)
    printed = done.stderr.partition("torch/distributed/elastic")[0].splitlines()
    return [line for line in printed if "Traceback" in line or "rror: " in line]


@pytest.mark.parametrize("kind", ["expected", "everywhere"])
def test_error_is_told_once(kind):
    assert fails([*TORCHRUN, "3"], kind, 2) == ["error: the disk is full of eels"]


def test_bug_under_deepspeed_keeps_the_traceback_of_its_rank_only():
    """Of rank 0, which holds what the others would ask."""
    command = [*DEEPSPEED, "3", "--master_port", str(free_port())]
    assert fails(command, "bug", 0) == ["[rank0]: Traceback (most recent call last):", "[rank0]: KeyError: 'a bug'"]


def test_killed_rank_is_missed_in_one_line():
    (line,) = fails([*TORCHRUN, "3"], "killed", 1)
    assert "of 3 has lost another process (" in line
    assert "(-9: killed" in line
