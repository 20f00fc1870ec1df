"""The order of samples: a function of seed and epoch alone."""

from __future__ import annotations

import json
from itertools import islice

import fsspec
import numpy as np
import pytest
import torch
from dumps import make_dump
from torch.utils.data import DataLoader

from megalens.data import DataError
from megalens.data.loader import ActivationLoader
from megalens.data.order import Mixture
from megalens.data.shards import verify

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


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_resuming_anywhere_neither_drops_nor_repeats(dump, world):
    undisturbed = sample_ids(dump[0], 30)
    for start in range(1, 25, 1 if world < 3 else 5):
        assert sample_ids(dump[0], 5, start, world=world) == undisturbed[start : start + 5]


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


def test_ranks_that_cannot_share_a_batch_are_refused(dump):
    with pytest.raises(DataError, match="multiple of 5"):
        ActivationLoader(dump[0], B, 0, 0, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_found_while_reading_ahead_reaches_the_caller(tmp_path, workers):
    make_dump(tmp_path)
    (tmp_path / "shard-00002.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=r"^shard [^\n]*shard-00002[^\n]*$"):
        list(islice(ActivationLoader(tmp_path, B, 0, workers=workers).batches(), 11))


# ------------------------------------------------------------------------------------------ workers, state, mixtures, remote


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("world", "start"), [(1, 9), (2, 0), (3, 23), (4, 10), (8, 1)])
def test_global_batches_are_the_same_with_any_number_of_workers(dump, world, workers, start):
    expected = list(islice(ActivationLoader(dump[0], B, 0, window_bytes=SMALL_WINDOW).batches(start), 12))
    shares = []
    for rank in range(world):
        loader = ActivationLoader(dump[0], B, 0, rank, world, SMALL_WINDOW, workers)
        shares.append(list(islice(loader.batches(start), 12)))
        assert (loader.state_dict()["epoch"], loader.state_dict()["row"]) == ((start + 11) // 10, (start + 11) % 10 * B + B)
    for step, batch in enumerate(expected):
        assert all(torch.equal(torch.cat([share[step][name] for share in shares]), batch[name]) for name in batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torch_data_loader_takes_it_as_a_dataset(dump, workers):
    loader = ActivationLoader(dump[0], B, 0, window_bytes=SMALL_WINDOW)
    batches = islice(DataLoader(loader, batch_size=None, num_workers=workers), 13)
    assert [batch["sample_id"].tolist() for batch in batches] == sample_ids(dump[0], 13)


@pytest.mark.parametrize("taken", [1, 9, 10, 13])
def test_a_state_goes_on_on_other_ranks_workers_and_batch_sizes_to_the_row(dump, taken):
    first = ActivationLoader(dump[0], B, 0, window_bytes=SMALL_WINDOW)
    batches = first.batches()
    seen = [i for batch in islice(batches, taken) for i in batch["sample_id"].tolist()]
    state = json.loads(json.dumps(first.state_dict()))
    batches.close()
    ranks = [ActivationLoader(dump[0], 10, 0, rank, 2, SMALL_WINDOW) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for batch in islice(zip(*map(iter, ranks), strict=True), (250 - state["row"]) // 10):
        seen += torch.cat([part["sample_id"] for part in batch]).tolist()
    epoch = seen[240 * state["epoch"] :]
    assert len(set(epoch)) == len(epoch) == 250 - (250 - state["row"]) % 10


def test_the_state_of_another_order_is_refused(dump, tmp_path):
    state = ActivationLoader(dump[0], B, 0).state_dict()
    make_dump(tmp_path, 250, seed=1)
    for other in [ActivationLoader(tmp_path, B, 0), ActivationLoader(dump[0], B, 1), ActivationLoader(dump[0], B, 0, window_bytes=1)]:
        with pytest.raises(DataError, match="cannot go on: its (identity|seed|window) was"):
            other.load_state_dict(state)


@pytest.fixture(scope="module")
def two_dumps(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in "ab"]
    return folders, [make_dump(folders[0], 250), make_dump(folders[1], 900, seed=1, layer=3)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (4, 0), (2, 3)])
def test_a_mixture_is_the_same_on_any_number_of_ranks_and_workers(two_dumps, world, workers):
    mix = dict(zip(two_dumps[0], [1, 2], strict=True))
    loaders = [ActivationLoader(mix, B, 0, rank, world, SMALL_WINDOW, workers) for rank in range(world)]
    whole = ActivationLoader(mix, B, 0, window_bytes=SMALL_WINDOW)
    for start in [0, 29, 31]:
        ranks = [loader.batches(start) for loader in loaders]
        for batch in islice(whole.batches(start), 4):
            parts = [next(rank) for rank in ranks]
            assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name]) for name in batch)


def test_a_mixture_holds_its_shares_and_no_row_twice(two_dumps):
    folders, rows = two_dumps
    loader = ActivationLoader(dict(zip(folders, [1, 2], strict=True)), B, 0, window_bytes=SMALL_WINDOW)
    assert loader.num_rows == 750  # the first dump is used up
    batches = list(islice(loader.batches(), loader.steps_per_epoch))
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert len(set(joined["sample_id"].tolist())) == 744
    assert 240 <= int((joined["source"] == 0).sum()) <= 250
    for source, first in [(0, 0), (1, 250)]:
        mine = joined["source"] == source
        index = joined["sample_id"][mine] - first
        assert torch.equal(joined["activation"][mine], rows[source]["activation"][index].float())
        assert torch.equal(joined["input_ids"][mine], rows[source]["input_ids"][index])
        assert (joined["layer"][mine] == 2 + source).all()
    assert 3 <= int((batches[0]["source"] == 0).sum()) <= 14


def test_the_shares_of_a_mixture_are_exact_over_many_rows():
    mixture = Mixture([40_000, 20_000, 100], [0.7, 0.29, 0.001])
    source, _ = mixture.deal(0, 0, 0, mixture.rows)
    counts = np.bincount(source)
    assert all(abs(count - share * mixture.rows) < 3 for count, share in zip(counts, map(float, mixture.shares), strict=True))
    assert all(counts <= [40_000, 20_000, 100])
    for first in [1, 4095, 4096, 20_001]:
        later, before = mixture.deal(0, 0, first, first + 5000)
        assert np.array_equal(later, source[first : first + 5000])
        assert np.array_equal(before, np.bincount(source[:first], minlength=3))


def test_the_statistics_of_a_mixture_are_those_of_its_rows(two_dumps):
    folders, rows = two_dumps
    loader = ActivationLoader(dict(zip(folders, [250, 900], strict=True)), B, 0)
    a = torch.cat([part["activation"] for part in rows]).float()
    torch.testing.assert_close(loader.statistics.mean, a.mean(0))
    torch.testing.assert_close(loader.statistics.var, a.var(0, correction=0))


def test_dumps_of_other_models_are_not_mixed(two_dumps, tmp_path):
    make_dump(tmp_path / "c", 100, subject={"name": "toy", "fingerprint": "x"})
    make_dump(tmp_path / "d", 100, d=8)
    for other, message in [("c", "is of another subject"), ("d", "cannot be mixed .*: d 8, 16")]:
        with pytest.raises(DataError, match=message):
            ActivationLoader({two_dumps[0][0]: 1, tmp_path / other: 1}, B, 0)
    with pytest.raises(DataError, match="greater than 0"):
        ActivationLoader({two_dumps[0][0]: 1, two_dumps[0][1]: 0}, B, 0)


def test_a_remote_dump_reads_like_a_local_one(dump):
    remote = fsspec.filesystem("memory")
    remote.put(str(dump[0]), "/acts", recursive=True)
    try:
        assert verify("memory://acts") == []
        ours, theirs = (ActivationLoader(folder, B, 0).batches(3) for folder in ["memory://acts", dump[0]])
        for a, b in islice(zip(ours, theirs, strict=True), 3):
            assert all(torch.equal(a[name], b[name]) for name in a)
        remote.pipe_file("/acts/shard-00001.arrow", b"nothing")
        assert "cut short" in verify("memory://acts")[0]
    finally:
        remote.rm("/acts", recursive=True)
