"""The worked example of docs/sweeps.md, by the installed W&B client, unmodified, against a stand-in of the server, and with no server."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from wandb_client import logged

from megalens.sweep.file import read_sweep

DOCS = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
METRIC = "train/loss"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)


def test_the_worked_example_from_preparation_to_the_best_learning_rate(wandb_server, checkout, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    printed, sweep = {}, ""
    for command in (line for block in blocks("bash") for line in block.splitlines()):
        if command == "python tools/make_tiny.py":
            continue  # the checkout has what it makes
        done = subprocess.run(["bash", "-c", command.replace("ENTITY/PROJECT/SWEEP_ID", sweep)], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        sweep = (re.findall(r"wandb agent (\S+)", done.stderr) or [sweep])[0]
        printed[command] = done.stdout
    trials = wandb_server.sweeps["sweep0"].trials
    found = {trial.args["learning_rate"]: logged(checkout, trial.id)[METRIC] for trial in trials}
    assert len(trials) == 2, "two agents with --count 1"
    assert list(found) == [1e-2, 3e-3], "each another point of the grid"
    best = min(found, key=found.get)
    offline, shown = (out for command, out in printed.items() if "sweep_offline" in command)
    assert offline == shown
    _, rate, loss, state = offline.splitlines()[1].split()
    assert (float(rate), float(loss), state) == (best, pytest.approx(found[best], rel=1e-3), "finished")
    assert f"learning_rate={best:g}" in re.search(r"^best: (.*)$", offline, flags=re.MULTILINE)[1]
    assert wandb_server.unknown == []


def test_the_files_that_the_docs_print_and_name_are_there(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (file,) = blocks("yaml")
    (tmp_path / "printed.yaml").write_text(file)
    assert read_sweep(tmp_path / "printed.yaml").searched == ["batch_size", "learning_rate"]
    paths = set(re.findall(r"\b(?:tools|slurm|benchmarks|conf|sweeps|tests)/\w+\.\w+", DOCS))
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    assert {file.name for file in Path("sweeps").glob("*.yaml")} <= set(re.findall(r"\w+\.yaml", DOCS))
