"""What a rank of a sharded engine holds, and what loading takes beside it."""

import memory_ranks
import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Bytes of full training by engine: the local one alone, the sharded ones on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    memory_ranks.prepare(folder, "tiny")
    alone = memory_ranks.launch(folder, memory_ranks.parse([]), "tiny", "full", 1, {"local"})
    return alone | memory_ranks.launch(folder, memory_ranks.parse([]), "tiny", "full", 2, {"z3", "fsdp"})


@pytest.mark.parametrize("engine", ["z3", "fsdp"])
def test_each_of_two_ranks_holds_about_half_and_loads_no_more_than_a_block_beside_it(found, engine):
    assert found[engine]["held"] <= memory_ranks.SHARE * found["local"]["held"]
    assert found[engine]["loading"] - found[engine]["loaded"] <= found[engine]["largest"]
