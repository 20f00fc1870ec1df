"""What a rank of a sharded engine holds, whether the planner says so, and what loading takes beside it."""

import sys

import memory_ranks
import pytest
from launched import ROOT, run_ranks

from megalens.planning import fit


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The benchmark's line of full training on two ranks, by engine."""
    folder, options = tmp_path_factory.mktemp("ranks"), memory_ranks.parse(["--engines", "z3", "fsdp", "--ranks", "2"])
    memory_ranks.prepare(folder, "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "FILES", fit.FILES)  # which the benchmark changes
        patch.setattr(memory_ranks, "start", lambda ranks, line: run_ranks(ROOT, ranks, [sys.executable, memory_ranks.__file__, *line]))
        return {line["engine"]: line for line in memory_ranks.measure(folder, options, "tiny", "full")}


@pytest.mark.parametrize("engine", ["z3", "fsdp"])
def test_each_of_two_ranks_holds_about_half_as_planned_and_loads_no_more_than_a_block_beside_it(found, engine):
    line = found[engine]
    assert line["ratio"] <= memory_ranks.SHARE
    assert line["spare_mb"] <= line["largest_mb"]
    assert line["planned"] == pytest.approx(1, abs=memory_ranks.PLAN)
