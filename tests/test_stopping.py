"""A stop reaches every process of a training, however it was started, and each ends behind a saved checkpoint."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import psutil
import pytest
from launched import DEEPSPEED, TRAIN, environment, free_port, make_place

PIPELINE = [sys.executable, "tools/run_pipeline.py", "--deepspeed", "ds_configs/z1.json"]
LONG = ["config=conf/tiny.yaml", "max_train_steps=20000s", "validation.interval=20000s", "checkpoint.save_interval=20000s"]
STARTED: list[str] = []  # runs of the test at hand
TWO_RANKS = [*DEEPSPEED, "2", "--master_port", "{port}", "megalens/train.py", "--deepspeed", "ds_configs/z1.json"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_dump):
    """A user's folder in which conf/tiny.yaml's activations are dumped."""
    return make_place(tmp_path_factory.mktemp("place"), tiny_dump)


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """A test that fails leaves no training at work."""
    yield
    for name in STARTED:
        for process in processes_of(name):
            process.kill()
    STARTED.clear()


def heed_hangups() -> None:
    """The tests themselves may run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_until(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def processes_of(run_name: str) -> list[psutil.Process]:
    """Every living process whose command line names the run."""
    found = psutil.process_iter(["cmdline", "status"])
    return [
        each for each in found if f"run_name={run_name}" in (each.info["cmdline"] or []) and each.info["status"] != psutil.STATUS_ZOMBIE
    ]


def has_logged(place, run_name: str, lines: int = 3) -> bool:
    path = place / "outputs" / run_name / "metrics.jsonl"
    return path.is_file() and len(path.read_text().splitlines()) >= lines


def start(place, command: list[str], run_name: str, **options) -> subprocess.Popen:
    """Start a long training and wait until it is at work."""
    command = [part.format(port=free_port()) for part in command]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heed_hangups} | options
    STARTED.append(run_name)
    started = subprocess.Popen([*command, *LONG, f"run_name={run_name}"], cwd=place, env=environment(), start_new_session=True, **options)
    wait_until(lambda: has_logged(place, run_name) or started.poll() is not None)
    assert started.poll() is None, started.stderr and started.stderr.read()
    return started


def is_saved_where_it_stopped(place, run_name: str) -> bool:
    run = place / "outputs" / run_name
    saved = json.loads((run / "last" / "trainer.json").read_text())["progress"]["step"]
    return saved >= json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_stopped_pipeline_ends_behind_the_ranks_of_deepspeed(place, number):
    name = f"pipeline-{number}"
    started = start(place, PIPELINE, name)
    started.send_signal(number)
    _, said = started.communicate(timeout=120)
    assert processes_of(name) == []
    assert started.returncode == 128 + number
    assert "stopped; the same command goes on from here" in said
    assert f"stopped by signal {int(number)}, the same command goes on from here: outputs/{name}/last" in said
    assert is_saved_where_it_stopped(place, name)


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_ranks_end_behind_a_checkpoint_when_their_deepspeed_is_gone(place, number):
    name = f"deepspeed-{number}"
    started = start(place, TWO_RANKS, name, stderr=subprocess.DEVNULL)
    assert len(processes_of(name)) >= 4, "the command, its launcher and two ranks"
    started.send_signal(number)
    started.wait(timeout=60)
    wait_until(lambda: processes_of(name) == [])
    assert is_saved_where_it_stopped(place, name)


def test_a_lost_terminal_ends_a_training_behind_a_checkpoint(place):
    """The terminal takes no more output then, and its signal reaches the loader's processes as well."""
    ours, theirs = pty.openpty()
    started = start(place, [*TRAIN, "loader_workers=1"], "hangup", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.close(ours)
    os.killpg(started.pid, signal.SIGHUP)
    assert started.wait(timeout=60) == 128 + signal.SIGHUP
    assert is_saved_where_it_stopped(place, "hangup")


def test_nohup_outlives_its_terminal(place):
    started = start(place, ["nohup", *TRAIN], "nohup", stdin=subprocess.DEVNULL)
    steps = len((place / "outputs" / "nohup" / "metrics.jsonl").read_text().splitlines())
    os.killpg(started.pid, signal.SIGHUP)
    wait_until(lambda: has_logged(place, "nohup", steps + 3))
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM
