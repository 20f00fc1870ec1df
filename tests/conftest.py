"""What every test starts from: no network, one thread per process, and the tiny model and corpus made once."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process per core already; threads would only take turns

import sys
from pathlib import Path

import pytest
import torch
from wandb_server import WandbServer

from megalens import tiny

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder ``data`` as ``python tools/make_tiny.py`` makes it; read only."""
    data = tmp_path_factory.mktemp("tiny") / "data"
    tiny.make_model(data / "models" / "tiny-llama")
    tiny.make_text(data / "corpus" / "tiny.jsonl")
    return data


@pytest.fixture
def checkout(tmp_path, tiny_data, monkeypatch) -> Path:
    """The working folder of a user who ran ``make_tiny``: the repository's files, own data and outputs, nobody else's."""
    for name in ("megalens", "tools", "conf", "ds_configs", "benchmarks", "slurm"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    for name in ("models", "corpus"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(tiny_data / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def wandb_server(monkeypatch):
    """A stand-in of the W&B server, and an environment in which `wandb sweep` and `wandb agent` talk to it."""
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        yield server
