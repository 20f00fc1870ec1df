"""Hard treatment of dumps, at any length; the tests run short versions.

usage: python tests/endure.py kills 200      kill a dump of 1 to 3 ranks so many times, then finish it and compare with an undisturbed one
       python tests/endure.py flips 400      flip so many single bytes, spread over all files of a dump: each must be detected

The model and text are the tiny ones.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from dumps import make_dump, quick_processes

from megalens.config import Config, config_from_dict
from megalens.data import DataError
from megalens.data.dump import dump
from megalens.data.pretokenize import pretokenize
from megalens.data.shards import ShardReader, verify
from megalens.tiny import make_model, make_text

SETTINGS = {"seq_len": 32, "min_pos": 8, "vectors_per_sequence": 8, "batch_size": 8, "rows_per_shard": 4, "rows_per_batch": 16}


def start(config: Config, ranks: int) -> list:
    """Ranks that dump at once."""
    processes = [quick_processes().Process(target=dump, args=(config,)) for _ in range(ranks)]
    for process in processes:
        process.start()
    return processes


def contents(config: Config) -> dict[str, bytes]:
    """Every file of both splits and all layers."""
    files = (path for path in sorted(config.activation_dir("train").parents[1].rglob("*")) if path.is_file())
    return {str(Path(*path.parts[-3:])): path.read_bytes() for path in files}


def kill_often(killed: Config, expected: dict[str, bytes], kills: int, seed: int = 0) -> Counter:
    """Dump, and kill all ranks at a random moment, ``kills`` times; a dump that finishes meanwhile is compared and begun anew.

    Returns:
        how often a kill came in the middle of a dump (``halfway``), how many dumps were finished and equal (``equal``), and with how many
        ranks the kills were (``1 ranks`` ...).

    Raises:
        AssertionError: a finished dump is not the undisturbed one, byte for byte.
    """
    folder, draw, counts = killed.activation_dir("train"), random.Random(seed), Counter()
    for _ in range(kills):
        ranks = draw.choice([1, 2, 3])
        before = len(list(folder.glob("*.arrow")))
        processes = start(killed, ranks)
        while len(list(folder.glob("*.arrow"))) == before and any(process.is_alive() for process in processes):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.3))
        alive = any(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        counts[f"{ranks} ranks"] += 1
        counts["halfway"] += alive and before < len(list(folder.glob("*.arrow"))) and not (folder / "meta.json").exists()
        if not alive:
            _compare(killed, expected, counts)
    (last,) = start(killed, 1)
    last.join()
    assert last.exitcode == 0
    _compare(killed, expected, counts)
    return counts


def _compare(config: Config, expected: dict[str, bytes], counts: Counter) -> None:
    found = contents(config)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, different
    counts["equal"] += 1
    for split in ("train", "val"):
        folder = config.activation_dir(split)
        for path in [folder / "meta.json", *folder.iterdir()]:
            path.unlink(missing_ok=True)


def flip_bytes(folder: Path, flips: int, seed: int = 0) -> Counter:
    """Flip one bit of one byte at a time, the places spread evenly over each file; each must be named by the check and by reading.

    Raises:
        AssertionError: one was not.
    """
    draw, counts = random.Random(seed), Counter()
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for path in files:
        intact = path.read_bytes()
        count = -(-flips // len(files))
        for place in {round(i * (len(intact) - 1) / max(1, count - 1)) for i in range(count)}:
            damaged = bytearray(intact)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            assert any(path.name in problem for problem in verify(folder)), f"byte {place} of {path.name}"
            try:
                reader = ShardReader(folder)
                for index in range(len(reader.batch_rows)):
                    reader.read_batch(index)
            except DataError as error:
                assert path.name in str(error), error
            else:
                raise AssertionError(f"byte {place} of {path.name} was read")
            counts["meta.json" if path.name == "meta.json" else "shards"] += 1
        path.write_bytes(intact)
    assert verify(folder) == []
    return counts


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("kills", "flips"):
        sys.exit(__doc__.strip())
    with tempfile.TemporaryDirectory() as name:
        place, number = Path(name), int(sys.argv[2])
        if sys.argv[1] == "flips":
            for encoding in ("bf16_planes", "int8"):
                make_dump(place / encoding, 250, encoding=encoding)
                print(f"detected, {encoding}: {dict(flip_bytes(place / encoding, number // 2))}", flush=True)
            return
        make_model(place / "llama")
        make_text(place / "text.jsonl", 100)
        common = {"model_name": str(place / "llama"), "dtype": "fp32", "device": "cpu", "dataset": {"name": str(place / "text.jsonl")}}
        common |= {"layer_l": 2, "pretokenize": {"root": str(place / "pretokenized"), "num_proc": 1}}
        alone, killed = (
            config_from_dict({**common, "activation_dumper": {"root": str(place / root), "layers": [1, 2], **SETTINGS}})
            for root in ("alone", "killed")
        )
        pretokenize(alone)
        dump(alone)
        print(dict(kill_often(killed, contents(alone), number)))


if __name__ == "__main__":
    main()
