"""Trainings started as commands in a user's folder, alone or under a launcher, and killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import quick
from quick import ROOT

from megalens.training.track import read_curve

TRAIN = [sys.executable, "megalens/train.py"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ALL_TERMS = ["kl_base_weight=1", "lm_base_weight=1", "tail_say_weight=1", "tail_read_weight=1", "entropy_weight=0.01"]
ALL_TERMS += ["terms.policy=0.5", "terms.imitate=0.2", "terms.rollout_read=0.2", "terms.reference_kl=0.5", "rollouts.draws=2"]
TEN_STEPS = ["max_train_steps=10s", "checkpoint.save_interval=3s", "validation.interval=5s"]


def make_place(folder: Path, data: Path) -> Path:
    """A user's folder with the repository's files, and with what ``data`` holds: a model and text, and what was made of them."""
    for name in ("megalens", "tools", "conf", "ds_configs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    for each in data.iterdir():
        (folder / "data" / each.name).symlink_to(each)
    sharded = json.loads((ROOT / "ds_configs" / "z3.json").read_text())
    sharded["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # everything in shards, however small
    (folder / "sharded.json").write_text(json.dumps(sharded))
    return folder


def dump_tiny(folder: Path) -> None:
    """Pretokenize and dump conf/tiny.yaml in a user's folder."""
    for tool in ("pretokenize.py", "dump_acts.py"):
        run_quickly(folder, [sys.executable, f"tools/{tool}", "config=conf/tiny.yaml"])


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT) if more.pop("installed", True) else ""} | more


def run(folder, command, code=0, **options):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**options))
    assert done.returncode == code, done.stderr[-3000:]
    return done


def run_quickly(folder, command, code=0, **options):
    """The same without the seconds of a start; see tests/quick.py."""
    done = quick.run(command, folder, environment(**options))
    assert done.returncode == code, done.stderr[-3000:]
    return done


def run_ranks(folder, count, command, code=0, **options):
    """A command on ranks that meet as under torchrun; what all of them printed on stderr."""
    ranks = quick.run_ranks(count, command, folder, environment(**options), free_port())
    said = "".join(rank.stderr for rank in ranks)
    assert any(rank.returncode for rank in ranks) == bool(code), said[-3000:]
    return said


def curve(folder, name):
    lines = read_curve(folder / "outputs" / name / "metrics.jsonl")
    return [{figure: value for figure, value in line.items() if not figure.startswith("perf/")} for line in lines]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def killed_at(folder, command, name, step, number=signal.SIGKILL):
    """Start a training, and send its whole process group a signal as soon as its curve has reached a micro-step; its exit code."""
    path = folder / "outputs" / name / "metrics.jsonl"
    if command[:1] == [sys.executable] and command[1].endswith(".py"):
        process = quick.Started(command, folder, environment())
    else:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True, **quiet)
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[-1] if lines[-1].endswith("}") else lines[-2])["step"] >= step:
            os.killpg(process.pid, number)
            break
        time.sleep(0.01)
    return process.wait()
