"""What every test starts from: no network, one thread per process, and the tiny model and corpus made once."""

import os

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process that a test starts compiles megalens anew
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process per core already; threads would only take turns

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import dump_tiny, make_place
from torch.profiler import ProfilerActivity, profile
from wandb_server import WandbServer

from megalens import tiny
from megalens.device import usable_cores
from megalens.files import Lock

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


def allocated_by(action) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at once, beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    events = sorted((event.start_ns(), event.nbytes()) for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    live = peak = 0
    for _, change in events:
        live += change
        peak = max(peak, live)
    return peak


# Files whose tests start trainings, launchers, clusters or compilers: `make quick` leaves them out.
SLOW = {
    "api",
    "baselines",
    "engine",
    "explain",
    "failure",
    "measure",
    "memory_ranks",
    "ops_tile",
    "ops_triton",
    "parity",
    "pipeline",
    "plan",
    "prepare_demo",
    "readme",
    "report",
    "rollouts",
    "search",
    "serve",
    "slurm",
    "stopping",
    "sweep_offline",
    "sweep_search",
    "tensor",
    "train",
    "trainer",
    "wandb_agent",
    "watchdog",
    "wheel",
    "write_texts",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out the files in SLOW and what has the marker minutes")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores: many tests wait for processes that they have started."""
    return usable_cores() + 1


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import the slow files."""
    return True if config.getoption("--quick") and collection_path.stem.removeprefix("test_") in SLOW else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with what takes minutes, or the other processes wait for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)
    if config.getoption("--quick"):
        left_out = [item for item in items if item.get_closest_marker("minutes")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first test process to ask for it makes, for all of them; read only."""
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, lock = base / name, Lock(base / f".{name}.lock")
    lock.acquire(wait=True)
    try:
        if not (base / f".{name}.made").exists():
            folder.mkdir()
            make(folder)
            (base / f".{name}.made").touch()
    finally:
        lock.release()
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder ``data`` as ``python tools/make_tiny.py`` makes it; read only."""

    def make(data: Path) -> None:
        tiny.make_model(data / "models" / "tiny-llama")
        tiny.make_text(data / "corpus" / "tiny.jsonl")

    return made_once(tmp_path_factory, "tiny", make)


@pytest.fixture
def checkout(tmp_path, tiny_data, monkeypatch) -> Path:
    """The working folder of a user who ran ``make_tiny``: the repository's files, own data and outputs, nobody else's."""
    for name in ("megalens", "tools", "conf", "ds_configs", "benchmarks", "slurm", "sweeps"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    for name in ("models", "corpus"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(tiny_data / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_dump(tmp_path_factory, tiny_data) -> Path:
    """A folder ``data`` with the tokens and activations of conf/tiny.yaml; read only."""
    return made_once(tmp_path_factory, "dumped", lambda folder: dump_tiny(make_place(folder, tiny_data))) / "data"


@pytest.fixture
def dumped_checkout(checkout, tiny_dump) -> Path:
    """A :func:`checkout` in which conf/tiny.yaml is pretokenized and dumped."""
    for name in ("pretokenized", "activations"):
        (checkout / "data" / name).symlink_to(tiny_dump / name)
    return checkout


@pytest.fixture
def wandb_server(monkeypatch):
    """A stand-in of the W&B server, and an environment in which `wandb sweep` and `wandb agent` talk to it."""
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        yield server
