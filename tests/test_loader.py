"""The order of samples: a function of seed and epoch alone."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from dumps import make_dump

from megalens.data import DataError
from megalens.data.loader import ActivationLoader

B = 24
SMALL_WINDOW = 16 * (16 * 2 + 12 * 4) * 3  # three record batches of 16 rows


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    return folder, make_dump(folder, 250)


def sample_ids(folder, steps: int, start: int = 0, window: int = SMALL_WINDOW, seed: int = 0, world: int = 1) -> list[list[int]]:
    """The concatenated global batches of a number of ranks."""
    ranks = [ActivationLoader(folder, B, seed, rank, world, window).batches(start) for rank in range(world)]
    return [torch.cat([next(rank)["sample_id"] for rank in ranks]).tolist() for _ in range(steps)]


@pytest.mark.parametrize("window", [1, SMALL_WINDOW, 1 << 28])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_global_batches_are_the_same_on_any_number_of_ranks(dump, world, window):
    assert sample_ids(dump[0], 25, window=window, world=world) == sample_ids(dump[0], 25, window=window)


@pytest.mark.parametrize("start", [1, 7, 9, 10, 11, 23])
@pytest.mark.parametrize("world", [1, 3])
def test_resuming_neither_drops_nor_repeats(dump, start, world):
    assert sample_ids(dump[0], 5, start, world=world) == sample_ids(dump[0], start + 5)[start:]


@pytest.mark.parametrize("window", [1, SMALL_WINDOW, 1 << 28])
def test_an_epoch_holds_no_row_twice(dump, window):
    loader = ActivationLoader(dump[0], B, 0, window_bytes=window)
    assert (loader.num_rows, loader.steps_per_epoch) == (250, 10)
    epoch = [i for batch in sample_ids(dump[0], 10, window=window) for i in batch]
    assert len(set(epoch)) == 240


def test_epochs_and_seeds_differ(dump):
    first, second = sample_ids(dump[0], 20)[:10], sample_ids(dump[0], 20)[10:]
    assert first != second
    assert first != sample_ids(dump[0], 10, seed=1)
    assert sample_ids(dump[0], 10) == first


def test_rows_of_different_record_batches_are_mixed(dump):
    batch = sample_ids(dump[0], 1)[0]
    assert len({(i // 100, i % 100 // 16) for i in batch}) == 3
    assert len({i // 16 for i in sample_ids(dump[0], 1, window=1 << 28)[0]}) > 6


def test_a_batch_holds_what_was_written(dump):
    folder, rows = dump
    for batch in islice(ActivationLoader(folder, B, 0).batches(), 12):
        index = batch["sample_id"]
        assert batch["activation"].dtype == torch.float32
        assert batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["activation"], rows["activation"][index].float())
        for name in ["input_ids", "position", "doc_id"]:
            assert torch.equal(batch[name], rows[name][index])


def test_rows_come_in_the_order_asked(dump):
    folder, rows = dump
    index = torch.tensor([249, 0, 17, 17, 101, 3])
    batch = ActivationLoader(folder, B, 0).rows(index)
    assert torch.equal(batch["sample_id"], index)
    assert torch.equal(batch["activation"], rows["activation"][index].float())
    assert torch.equal(batch["input_ids"], rows["input_ids"][index])


def test_documents_of_all_rows(dump):
    assert torch.equal(ActivationLoader(dump[0], B, 0).documents(), dump[1]["doc_id"])


def test_a_dump_smaller_than_a_batch_is_refused_with_the_keys_to_change(dump):
    with pytest.raises(DataError, match=r"250 rows.*batch_size=251.*num_samples"):
        ActivationLoader(dump[0], 251, 0)


def test_ranks_that_can_not_share_a_batch_are_refused(dump):
    with pytest.raises(DataError, match="multiple of 5"):
        ActivationLoader(dump[0], B, 0, 0, 5)


def test_damage_found_while_reading_ahead_reaches_the_caller(tmp_path):
    make_dump(tmp_path)
    (tmp_path / "shard-00002.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="shard-00002"):
        list(islice(ActivationLoader(tmp_path, B, 0).batches(), 11))
