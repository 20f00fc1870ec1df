"""A wheel holds everything that the commands need: installed where there is no checkout, it trains a lens."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import megalens
from megalens import shipped
from megalens.config import load_config


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source") / "megalens"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("megalens", "conf", "ds_configs"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "made", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "made").glob("megalens-*.whl")
    return built


def test_the_wheel_carries_its_version_types_and_files(wheel):
    assert wheel.name == f"megalens-{megalens.__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    files = {f"megalens/_files/{path.relative_to(ROOT)}" for folder in shipped.FOLDERS for path in (ROOT / folder).rglob("*.*")}
    assert len(files) > 10
    sources = {f"megalens/{path.relative_to(ROOT / 'megalens')}" for path in (ROOT / "megalens").rglob("*.*") if path.suffix != ".pyc"}
    assert (files | sources) - held == set()
    assert {name.split("/")[0] for name in held} == {"megalens", f"megalens-{megalens.__version__}.dist-info"}


@pytest.mark.minutes
def test_installed_without_a_checkout_it_trains_a_lens(wheel, tmp_path):
    """Into an environment that sees this one's packages, but not this checkout."""
    home, place = tmp_path / "env", tmp_path / "elsewhere"
    place.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = (home / "lib").glob("python*/site-packages")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, env=environment, check=True, capture_output=True)
    (packages / "these.pth").write_text("\n".join(site.getsitepackages()))

    def run(command: str, *arguments: str) -> str:
        done = subprocess.run([home / "bin" / command, *arguments], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} {arguments}: {done.stderr[-3000:]}"
        return done.stdout

    assert run("python", "-c", "import megalens; print(megalens.__file__)").startswith(str(packages))
    assert "pretokenize" in run("megalens", "--help")
    run("megalens", "make-tiny")
    run("megalens", "pipeline", "config=conf/tiny.yaml", "device=cpu")
    assert (place / "outputs" / "tiny" / "best" / "lens.safetensors").is_file()
    shards = "data/activations/tiny-llama/layer_2/tiny_train"
    assert run("megalens", "verify", shards).startswith("ok")


def test_files_of_the_users_folder_come_before_megalens_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find("conf/tiny.yaml") == ROOT / "conf" / "tiny.yaml"
    assert load_config(["config=conf/tiny.yaml"]).run_name == "tiny"
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "tiny.yaml").write_text("seed: 7")
    assert shipped.find("conf/tiny.yaml") == Path("conf/tiny.yaml")
    assert load_config(["config=conf/tiny.yaml"]).seed == 7


@pytest.mark.parametrize("path", ["conf/none.yaml", "README.md", "setup.py", "../conf/tiny.yaml"])
def test_nothing_else_is_found_beside_the_package(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find(path) == Path(path)
