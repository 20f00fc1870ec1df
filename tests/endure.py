"""Hard treatment of dumps and trainings, at any length; the tests run short versions.

usage: python tests/endure.py kills 200      kill a dump of 1 to 3 ranks so many times, then finish it and compare with an undisturbed one
       python tests/endure.py flips 400      flip so many single bytes, spread over all files of dumps and a checkpoint: each must be found
       python tests/endure.py train-kills 50 kill a training at so many moments, mid-save too, and compare its weights and curve
       python tests/endure.py elastic 2      kill and resume a training under 2, 1, 3 ranks and three engines, with so many optimizers

The model and text are the tiny ones.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import quick
import torch
from dumps import make_dump
from launched import (
    ALL_TERMS,
    DEEPSPEED,
    TRAIN,
    curve,
    dump_tiny,
    environment,
    free_port,
    killed_at,
    make_place,
    run,
    run_quickly,
    run_ranks,
)
from tiny_run import make_subject_and_dump, tiny_config

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import check_checkpoint
from megalens.checkpoint.formats.megalens import read_weights
from megalens.config import Config, config_from_dict
from megalens.data import DataError
from megalens.data.dump import dump
from megalens.data.pretokenize import pretokenize
from megalens.data.shards import ShardReader, verify
from megalens.tiny import make_model, make_text
from megalens.train import train

SETTINGS = {"seq_len": 32, "min_pos": 8, "vectors_per_sequence": 8, "batch_size": 8, "rows_per_shard": 4, "rows_per_batch": 16}


def start(config: Config, ranks: int) -> list:
    """Ranks that dump at once."""
    processes = [quick.context().Process(target=dump, args=(config,)) for _ in range(ranks)]
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


def flip_checkpoint_bytes(run_dir: Path, flips: int, seed: int = 0) -> Counter:
    """The same for a run's last checkpoint, whose check must name the file (or its checksums).

    Raises:
        AssertionError: one was not found.
    """
    draw, counts, folder = random.Random(seed), Counter(), (run_dir / "last").resolve()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        name, intact = str(path.relative_to(folder)), path.read_bytes()
        for _ in range(-(-flips // len(files))):
            damaged = bytearray(intact)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            try:
                check_checkpoint(folder)
            except CheckpointError as error:
                assert name == "checksums.json" or name in str(error), error
                counts[name] += 1
            else:
                raise AssertionError(f"a flipped byte of {name} was not found")
        path.write_bytes(intact)
    check_checkpoint(folder)
    return counts


def kill_trainings(place: Path, kills: int, seed: int = 0) -> Counter:
    """Train, and kill the process ``kills`` times, every other time in mid-save; a finished one is compared and begun anew.

    Returns:
        how often a kill came before the first step (``early``), in the middle of a save (``mid-save``) or else (``between``), and how
        many trainings were finished (``equal``).

    Raises:
        AssertionError: a finished training has other weights or another curve than the undisturbed one.
    """
    settings = ["config=conf/tiny.yaml", "max_train_steps=60s", "checkpoint.save_interval=1s", "validation.interval=20s"]
    run(place, [*TRAIN, *settings, "run_name=alone"])
    draw, counts, killed = random.Random(seed), Counter(), 0
    while killed < kills:
        name = f"killed-{counts['equal']}"
        checkpoints, lines = place / "outputs" / name / "checkpoints", place / "outputs" / name / "metrics.jsonl"
        mid_save, wait, seen = killed % 2 == 0, draw.uniform(0, 1.5), set(checkpoints.glob("step-*"))
        with subprocess.Popen([*TRAIN, *settings, f"run_name={name}"], cwd=place, env=environment(), stderr=subprocess.DEVNULL) as process:
            if draw.random() < 0.9:  # else while it loads
                while process.poll() is None and set(checkpoints.glob("step-*")) == seen:
                    time.sleep(0.002)
            end = time.monotonic() + wait
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
            while process.poll() is None and mid_save and not list(checkpoints.glob(".step-*.unfinished")):
                pass
            if process.poll() is None:
                process.kill()
        if process.returncode == -signal.SIGKILL:
            killed += 1
            unfinished = any(checkpoints.glob(".step-*.unfinished"))
            counts["mid-save" if unfinished else "between" if lines.exists() else "early"] += 1
        else:
            assert process.returncode == 0
            _compare_trainings(place, name)
            counts["equal"] += 1
    name = f"killed-{counts['equal']}"
    run(place, [*TRAIN, *settings, f"run_name={name}"])
    _compare_trainings(place, name)
    counts["equal"] += 1
    return counts


def _compare_trainings(place: Path, name: str) -> None:
    mine, theirs = (read_weights(place / "outputs" / each / "last") for each in (name, "alone"))
    assert mine.keys() == theirs.keys()
    different = [key for key in theirs if not torch.equal(mine[key], theirs[key])]
    assert not different, different
    assert curve(place, name) == curve(place, "alone")


def change_engines(place: Path, optimizer: str) -> dict[str, float]:
    """A training killed under DeepSpeed on 2 ranks, again under FSDP2 in one process, finished by 3 ranks that average gradients.

    Every rank writes a part of every checkpoint.

    Returns:
        the largest relative difference of a step's loss and of a validation's from an undisturbed training's, and of a final
        weight tensor relative to its norm.

    Raises:
        AssertionError: a part of the run was not killed, or did not begin where the one before was saved.
    """
    common = ["config=conf/tiny.yaml", *ALL_TERMS, "max_train_steps=12s", "checkpoint.save_interval=2s", "validation.interval=4s"]
    common += ["batch_size=12", "validation.num_samples=12", f"optimizer={optimizer}"]
    common += ["learning_rate=0.01"] if optimizer == "sgd" else []
    name, alone = f"changed-{optimizer}", f"alone-{optimizer}"
    run_quickly(place, [*TRAIN, *common, f"run_name={alone}"])
    script = ["tests/train_in_parts.py", *common, f"run_name={name}"]
    zero = [*DEEPSPEED, "2", "--master_port", str(free_port()), *script, "--deepspeed", "sharded.json"]
    assert killed_at(place, zero, name, step=4) == -signal.SIGKILL
    assert killed_at(place, [sys.executable, *script, "engine=fsdp"], name, step=8) == -signal.SIGKILL
    said = run_ranks(place, 3, [sys.executable, *script])
    assert re.search(rf"training outputs/{name} from step-000000(06|08|10) of outputs/{name} on 3 x cpu", said), said
    assert len(list((place / "outputs" / name / "last").glob("lens-*-of-00003.safetensors"))) == 3
    mine, theirs = curve(place, name), curve(place, alone)
    assert [line.keys() for line in mine] == [line.keys() for line in theirs]
    assert sum("train/loss" in line for line in mine) == 12
    found = {
        key: max(abs(one[key] / other[key] - 1) for one, other in zip(mine, theirs, strict=True) if key in one)
        for key in ("train/loss", "val/loss")
    }
    weights, expected = (read_weights(place / "outputs" / each / "last") for each in (name, alone))
    assert weights.keys() == expected.keys()
    return found | {"weights": max(((weights[key] - value).norm() / value.norm()).item() for key, value in expected.items())}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("kills", "flips", "train-kills", "elastic"):
        sys.exit(__doc__.strip())
    with tempfile.TemporaryDirectory() as name:
        place, number = Path(name), int(sys.argv[2])
        if sys.argv[1] in ("train-kills", "elastic"):
            make_model(place / "tiny" / "models" / "tiny-llama")
            make_text(place / "tiny" / "corpus" / "tiny.jsonl")
            dump_tiny(make_place(place, place / "tiny"))
        if sys.argv[1] == "train-kills":
            print(dict(kill_trainings(place, number)))
            return
        if sys.argv[1] == "elastic":
            for optimizer in ("adamw", "sgd")[:number]:
                print(f"{optimizer}: {change_engines(place, optimizer)}", flush=True)
            return
        if sys.argv[1] == "flips":
            for encoding in ("bf16_planes", "int8"):
                make_dump(place / encoding, 250, encoding=encoding)
                print(f"detected, {encoding}: {dict(flip_bytes(place / encoding, number // 2))}", flush=True)
            (place / "run").mkdir()
            make_subject_and_dump(place / "run")
            config = tiny_config(place / "run")
            assert train(config) == 0
            print(f"detected, checkpoint: {dict(flip_checkpoint_bytes(config.run_dir, number))}")
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
