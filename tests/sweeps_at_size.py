"""Whole sweeps of real trainings on the tiny model: by W&B's agents against a stand-in of the server, and with no server, killed half-way.

    python -m pytest -o addopts= -s tests/sweeps_at_size.py

About 15 minutes on 2 cores. The small versions, which always run, are test_wandb_agent.py, test_slurm.py and test_sweep_offline.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from conftest import ROOT
from wandb_client import create, logged, wandb

from megalens.training.track import read_curve

METRIC = "train/loss"
AGENTS = """
program: megalens/train.py
method: {method}
metric: {{name: train/loss, goal: minimize}}
parameters:
  learning_rate: {rates}
  alpha_schedule.value: {{value: 0.2}}
  config: {{value: conf/tiny.yaml}}
  max_train_steps: {{value: 4s}}
  wandb.mode: {{value: offline}}
"""
RANGE = "{min: 1.0e-4, max: 1.0e-2, distribution: log_uniform_values}"
OFFLINE = """
program: megalens/train.py
method: {method}
metric: {{name: val/loss, goal: minimize}}
{more}
parameters:
  {searched}
  config: {{value: conf/tiny.yaml}}
  max_train_steps: {{value: 40s}}
  validation.interval: {{value: 1s}}
  wandb.mode: {{value: offline}}
"""
RATE = "learning_rate: {min: 1.0e-5, max: 1.0e-2, distribution: log_uniform_values}"
SIZES = {  # name: (method, trials, what else the file says, parameters)
    "grid": ("grid", 8, "", "learning_rate: {values: [1.0e-2, 3.0e-3, 1.0e-3, 7.0e-4, 5.0e-4, 3.0e-4, 1.0e-4, 1.0e-5]}"),
    "bayes": ("bayes", 20, "", f"{RATE}\n  batch_size: {{values: [8, 16]}}"),
    "hyperband": ("random", 20, "early_terminate: {type: hyperband, min_iter: 3, eta: 2}", RATE),
}


@pytest.fixture
def trainings(dumped_checkout, monkeypatch):
    """A folder in which trials can train."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return dumped_checkout


# ------------------------------------------------------------------------------------------------------- by W&B's agents


def write(folder, method, rates):
    path = folder / f"{method}.yaml"
    path.write_text(AGENTS.format(method=method, rates=rates))
    return path


def agent(*arguments):
    """Start `wandb agent` beside others; its output goes to a file of its own."""
    log = open(f"agent-{time.monotonic_ns()}.log", "w")  # noqa: SIM115 - the agent's
    return subprocess.Popen(["wandb", "agent", *arguments], stdout=log, stderr=log)


def test_grid_random_and_bayes_by_agents_at_the_same_time(wandb_server, trainings):
    wandb_server.metric_of = lambda run_id, name: logged(trainings, run_id).get(name)
    grid, random, bayes = (
        create(write(trainings, method, values))
        for method, values in [("grid", "{values: [1.0e-2, 1.0e-3, 1.0e-4]}"), ("random", RANGE), ("bayes", RANGE)]
    )
    agents = [agent(grid), agent(grid), agent("--count", "2", random), agent("--count", "4", bayes)]
    assert [process.wait(timeout=280) for process in agents] == [0, 0, 0, 0]
    grid, random, bayes = wandb_server.sweeps.values()
    assert sorted(trial.args["learning_rate"] for trial in grid.trials) == [1e-4, 1e-3, 1e-2], "two agents, each point once"
    assert [len(random.trials), len(bayes.trials)] == [2, 4]
    for trial in [*grid.trials, *random.trials, *bayes.trials]:
        run = trainings / "outputs" / f"tiny-{trial.id}"
        about = json.loads((run / "last" / "lens.json").read_text())
        assert about["config"]["learning_rate"] == trial.args["learning_rate"]
        assert about["config"]["alpha_schedule"]["value"] == 0.2
        figures = logged(trainings, trial.id)
        assert figures[METRIC] == pytest.approx([line[METRIC] for line in read_curve(run / "metrics.jsonl") if METRIC in line][-1])
        assert {"val/loss", "val/fve_nrm", "val/kl_recovered"} <= figures.keys()
    assert sum(trial.metric is not None for trial in bayes.trials) >= 3, "the metric arrives, and the search goes by it"
    assert wandb_server.unknown == []


def test_a_wrong_parameter_ends_the_trial_with_one_line_before_anything_loads(wandb_server, trainings):
    file = write(trainings, "grid", "{values: [1.0e-3]}")
    file.write_text(file.read_text().replace("learning_rate:", "learning_rat:"))
    output = wandb("agent", "--count", "1", create(file))
    assert "error: unknown key 'learning_rat' in the command line; did you mean 'learning_rate'?" in output
    assert "Traceback" not in output


# ------------------------------------------------------------------------------------------------------ with no server


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "tools/sweep_offline.py", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(lines):
    """The trials that lines of a sweep tell to have ended."""
    return {int(number) for number in re.findall(r"trial (\d+): (?:finished|ended early)", "\n".join(lines))}


@pytest.mark.parametrize("name", SIZES)
def test_a_sweep_killed_half_way_and_taken_up_by_two_processes_repeats_nothing(trainings, name):
    method, count, more, searched = SIZES[name]
    Path(f"{name}.yaml").write_text(OFFLINE.format(method=method, more=more, searched=searched))
    command = [f"{name}.yaml", "--count", str(count)]
    started, told = time.monotonic(), []
    doomed = start(*command, "--jobs", "2")
    for line in doomed.stderr:
        told.append(line)
        if len(ended(told)) == count // 2:
            break
    doomed.kill()
    told += doomed.stderr
    doomed.communicate()
    killed = time.monotonic()
    logs = {number: Path(f"outputs/sweeps/{name}/trial-{number}.log") for number in range(count)}
    before = {number: logs[number].read_bytes() for number in ended(told)}
    both = [start(*command) for _ in range(2)]
    printed = [process.communicate(timeout=900) for process in both]
    seconds = time.monotonic() - killed
    assert [process.returncode for process in both] == [0, 0], printed
    assert all(logs[number].read_bytes() == log for number, log in before.items()), "what had ended is left as it was"
    mine, others = (ended(err.splitlines()) for _, err in printed)
    assert mine
    assert others
    assert not mine & others
    assert mine | others == set(range(count)) - set(before)
    curves = [read_curve(f"outputs/{name}-{number:03d}/metrics.jsonl") for number in range(count)]
    steps = [[line["step"] for line in curve if METRIC in line] for curve in curves]
    assert all(trained == list(range(1, len(trained) + 1)) for trained in steps), "no step twice"
    configs = [json.loads(Path(f"outputs/{name}-{number:03d}/last/lens.json").read_text())["config"] for number in range(count)]
    assert len({(config["batch_size"], config["learning_rate"]) for config in configs}) == count, "no point twice"
    share = sum(map(len, steps)) / (40 * count)
    assert share <= 0.5 if name == "hyperband" else share == 1
    out = printed[0][0]
    best = re.search(r"^best: (.*)$", out, flags=re.MULTILINE)[1]
    subprocess.run([sys.executable, *shlex.split(best)[1:]], check=True, capture_output=True)
    again = [line["val/loss"] for line in read_curve(f"outputs/{name}-best/metrics.jsonl") if "val/loss" in line]
    value = float(out.splitlines()[1].split()[-2 if out.splitlines()[1].endswith("finished") else -3])
    assert again[-1] == pytest.approx(value, rel=1e-3)
    print(
        f"\n{name}: {count} trials, {share:.2f} of all steps; {killed - started:.0f} s to the kill, {seconds:.0f} s by two processes",
        end="",
    )
    print(f" ({len(mine)} and {len(others)} trials)\n{out}")


def test_jobs_of_slurm_share_an_offline_sweep_and_one_is_requeued(trainings, tmp_path_factory):
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    rates = "learning_rate: {values: [1.0e-2, 3.0e-3, 1.0e-3, 3.0e-4, 1.0e-4, 1.0e-5]}"
    Path("shared.yaml").write_text(OFFLINE.format(method="grid", more="", searched=rates))
    Path("logs").mkdir()
    with slurm_cluster.SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as slurm:
        slurm.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), slurm.environment["PATH"]])
        command = ["--requeue", "--open-mode=append", "--output=logs/sweep_%j.out", "--wrap", "python tools/sweep_offline.py shared.yaml"]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        jobs = [slurm.call("sbatch", "--parsable", *command, cwd=trainings, **environment).strip() for _ in range(3)]
        logs = [Path(f"logs/sweep_{job}.out") for job in jobs]
        slurm.wait(lambda: logs[0].exists() and "trial" in logs[0].read_text(), "the first job's trial", 120)
        slurm.call("scontrol", "requeue", jobs[0])
        states = [slurm.wait_job(job) for job in jobs]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 3, [log.read_text()[-2000:] for log in logs]
    finished = [number for log in logs for number in ended(log.read_text().splitlines())]
    assert sorted(finished) == list(range(6)), "each once, whoever did it"
    for number in range(6):
        curve = read_curve(f"outputs/shared-{number:03d}/metrics.jsonl")
        assert [line["step"] for line in curve if METRIC in line] == list(range(1, 41))
    print("\n", [sorted(ended(log.read_text().splitlines())) for log in logs], logs[0].read_text()[-1500:])
