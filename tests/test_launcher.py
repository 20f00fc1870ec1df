"""What a launcher says in the environment, and what is left over of one."""

import subprocess

import pytest
import torch
from conftest import ROOT
from launched import TRAIN, environment, free_port

from megalens.config import ConfigError
from megalens.device import resolve_device, usable_cores
from megalens.engine import EngineError, join_ranks
from megalens.launcher import Place, launched, rank

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def said(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)

    def say(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return say


def test_nothing_said_is_the_only_process(said):
    assert launched() == Place(0, 1, 0)


def test_a_launcher_is_believed(said):
    said(**TORCHRUN)
    assert launched() == Place(1, 4, 1)


@pytest.mark.parametrize(
    ("left_over", "message"),
    [
        ({"RANK": "x"}, "RANK=x in the environment is no number"),
        ({"RANK": "-1"}, "RANK=-1 in the environment is no number"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE=4.0 in the environment is no number"),
        ({"LOCAL_RANK": "٣"}, "LOCAL_RANK=٣ in the environment is no number"),
        ({"RANK": "9" * 5000}, "in the environment is no number"),
        ({"WORLD_SIZE": "0"}, "RANK=0 in the environment is not below WORLD_SIZE=0"),
        ({"RANK": "3"}, "RANK=3 in the environment is not below WORLD_SIZE=1"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 stands in the environment without RANK and MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 stands in the environment without MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_what_is_left_over_is_named_with_the_mend(said, left_over, message):
    said(**left_over)
    with pytest.raises(ConfigError) as caught:
        launched()
    assert message in str(caught.value)
    assert "; unset RANK WORLD_SIZE LOCAL_RANK" in str(caught.value)


def test_who_prints_asks_for_the_rank_alone(said):
    said(RANK="3")
    assert rank() == 3


@pytest.mark.parametrize("left_over", [{"RANK": "0", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "4"}, {"RANK": "x"}])
def test_a_training_tells_it_in_one_line(left_over):
    done = subprocess.run([*TRAIN, "config=conf/tiny.yaml"], cwd=ROOT, env=environment(**left_over), capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "unset RANK WORLD_SIZE LOCAL_RANK" in line


def test_ranks_that_do_not_meet_are_told_in_one_line(said, monkeypatch):
    port = free_port()
    said(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def lost(*_, **__):
        raise torch.distributed.DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(torch.distributed, "init_process_group", lost)
    with pytest.raises(EngineError, match=f"process 1 of 2 does not find the others at 127.0.0.1:{port} .Timed out .*; start all of them"):
        join_ranks(torch.device("cpu"))


def test_a_process_without_a_gpu_of_its_own_is_named(said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said(**TORCHRUN)
    assert resolve_device("auto") == torch.device("cuda", 1)
    said(LOCAL_RANK="2")
    with pytest.raises(ConfigError, match="LOCAL_RANK=2 has no GPU of its own: PyTorch sees 2 here"):
        resolve_device("auto")


def test_cores_are_counted_where_no_process_is_pinned(monkeypatch):
    assert usable_cores() >= 1
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert usable_cores() >= 1
