"""Jobs under a real Slurm of two nodes: trainings that are interrupted and end like one that is not, the pipeline, and sweeps."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import slurm_cluster
import torch
from conftest import ROOT
from launched import TRAIN, run_quickly
from safetensors.torch import load_file
from wandb_client import records
from wandb_server import WandbServer

from megalens.training.track import read_curve

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STEPS = 120
LONG = ["config=conf/tiny.yaml", f"max_train_steps={STEPS}s", "checkpoint.save_interval=15s", "validation.interval=60s"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    with slurm_cluster.SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        cluster.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), cluster.environment["PATH"]])
        yield cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_dump):
    """A user's folder in which conf/tiny.yaml's activations are dumped, and room for logs."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("megalens", "tools", "conf", "ds_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("data", "logs"):
        (folder / name).mkdir()
    for each in tiny_dump.iterdir():
        (folder / "data" / each.name).symlink_to(each)
    return folder


def submit(slurm, place, *arguments, **environment):
    return slurm.call("sbatch", "--parsable", *arguments, cwd=place, **ENVIRONMENT, **environment).strip()


@pytest.fixture(scope="module")
def undisturbed(slurm, place):
    """The long training by one process."""
    run_quickly(place, [*TRAIN, *LONG, "run_name=undisturbed"])
    return place / "outputs" / "undisturbed"


def wait_for_step(slurm, place, job, name, step, seconds=120):
    """Until the run has logged a step."""
    curve, until = place / "outputs" / name / "metrics.jsonl", time.monotonic() + seconds
    while not (curve.exists() and any(line["step"] >= step for line in read_curve(curve))):
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), logs(place, job)
        assert time.monotonic() < until, f"no step {step} of {name} in {seconds} s; {logs(place, job)}"
        time.sleep(0.1)


def logs(place, job):
    """The end of what a job wrote."""
    return {path.name: path.read_text()[-3000:] for path in (place / "logs").glob(f"*_{job}.*")}


def losses(folder):
    return torch.tensor([line["train/loss"] for line in read_curve(folder / "metrics.jsonl") if "train/loss" in line])


# ---------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("launcher, arguments", [("torchrun", []), ("deepspeed", ["--deepspeed", "ds_configs/z3.json"])])
def test_two_nodes_interrupted_twice_end_like_one_process_undisturbed(slurm, place, undisturbed, launcher, arguments):
    """Warned as ahead of the time limit, requeued; then a node loses power, requeued; then finished."""
    script = ["--nodes=2", "slurm/multinode.sbatch", *arguments, *LONG, f"run_name={launcher}"]
    job = submit(slurm, place, *script, LAUNCHER=launcher)
    wait_for_step(slurm, place, job, launcher, 20)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", "the requeue", 60)
    saved = json.loads((place / "outputs" / launcher / "last" / "trainer.json").read_text())
    assert 20 <= saved["progress"]["step"] < STEPS
    assert saved["world_size"] == 2
    wait_for_step(slurm, place, job, launcher, saved["progress"]["step"] + 20)
    slurm.kill_node("n2")
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "2", "the second requeue", 60)
    slurm.start_node("n2")
    assert slurm.wait_job(job)["JobState"] == "COMPLETED", logs(place, job)
    ours = place / "outputs" / launcher
    torch.testing.assert_close(losses(ours), losses(undisturbed), rtol=1e-4, atol=0)
    expected = load_file(undisturbed / "last" / "lens.safetensors")
    found = load_file(ours / "last" / "lens.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------- pipeline


def submit_pipeline(slurm, place, *arguments):
    """What slurm/submit.sh says, and the numbers of the jobs by what they run."""
    command = ["bash", "slurm/submit.sh", *arguments]
    done = subprocess.run(command, cwd=place, env=slurm.environment | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"job (\d+): sbatch --parsable --job-name=megalens-(\w+)", done.stderr)
    return done.stderr, {name: job for job, name in found}


def test_the_pipeline_is_a_chain_of_jobs_that_reuses_what_is_there(slurm, place):
    settings = ["config=conf/tiny.yaml", "max_train_steps=2s", "pretokenize.root=own", "activation_dumper.root=own", "run_name=chain"]
    said, jobs = submit_pipeline(slurm, place, "--nodes=2", "--", *settings)
    assert list(jobs) == ["pretokenize", "dump_acts", "train"]
    assert "own/tiny/tiny-llama: there is no pretokenized corpus in own/tiny/tiny-llama" in said
    assert slurm.job(jobs["train"])["Dependency"].startswith(f"afterok:{jobs['dump_acts']}")
    assert slurm.job(jobs["pretokenize"])["NumNodes"] == "1"
    assert slurm.job(jobs["train"])["NumNodes"].startswith("2")
    assert slurm.wait_job(jobs["train"])["JobState"] == "COMPLETED", [logs(place, job) for job in jobs.values()]
    assert json.loads((place / "outputs/chain/last/trainer.json").read_text())["world_size"] == 2
    said, jobs = submit_pipeline(slurm, place, *settings)
    assert said.count("valid, reusing it") == 2
    assert list(jobs) == ["train"]
    assert slurm.wait_job(jobs["train"])["JobState"] == "COMPLETED", logs(place, jobs["train"])


def test_a_stage_that_fails_takes_those_behind_it_out_of_the_queue(slurm, place):
    settings = ["config=conf/tiny.yaml", "dataset.min_words=100000", "pretokenize.root=none", "activation_dumper.root=none"]
    jobs = submit_pipeline(slurm, place, *settings)[1]
    assert slurm.wait_job(jobs["train"])["JobState"] == "CANCELLED"
    assert slurm.job(jobs["pretokenize"])["JobState"] == "FAILED"
    assert "error: " in logs(place, jobs["pretokenize"])[f"megalens-pretokenize_{jobs['pretokenize']}.err"]


def test_without_slurm_the_stages_run_in_line(place, tmp_path):
    for name, body in {"python": 'echo "$@"', "dirname": 'exec /usr/bin/dirname "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    command = ["/bin/bash", "slurm/submit.sh", "--nodes=2", "--", "config=conf/tiny.yaml", "seed=1"]
    done = subprocess.run(command, cwd=place, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout == "tools/run_pipeline.py config=conf/tiny.yaml seed=1\n"
    assert "no Slurm here" in done.stderr


# ------------------------------------------------------------------------------------------------------------------ sweeps

SWEEP = """
program: megalens/train.py
method: grid
metric: {name: train/loss, goal: minimize}
parameters:
  learning_rate: {values: [1.0e-2, 1.0e-3]}
  tail_say_weight: {values: [0.0, 1.0]}
  config: {value: conf/tiny.yaml}
  wandb.mode: {value: offline}
  max_train_steps: {value: 250s}
  validation.interval: {value: 250s}
  checkpoint.save_interval: {value: 250s}
"""


def test_four_agents_do_a_grid_of_four_each_point_once_and_one_that_is_preempted_goes_on(slurm, place):
    (place / "sweep.yaml").write_text(SWEEP)
    with WandbServer() as server:
        command = ["bash", "slurm/submit_sweep.sh", "sweep.yaml", "4", "--cpus-per-task=1"]
        said = slurm.call(*command, cwd=place, **ENVIRONMENT, **server.environment, WANDB_MODE="offline").split()
        jobs = [job for before, job in pairwise(said) if before == "job"]
        assert said[:2] == ["sweep", "tester/lenses/sweep0"]
        wait_for_step(slurm, place, jobs[0], "tiny-sweep0run0", 10)
        (preempted,) = (job for job in jobs if "sweep0run0" in environment_of(job))
        slurm.call("scontrol", "requeue", preempted)
        last = place / "outputs" / "tiny-sweep0run0" / "last" / "trainer.json"
        slurm.wait(lambda: json.loads(last.read_text())["progress"]["step"] >= 10, "the checkpoint of the preempted trial", 90)
        assert json.loads(last.read_text())["progress"]["step"] < 250
        server.requeue("sweep0run0")  # as W&B does with a run that said so; this one says it to its file
        for job in jobs:
            state = slurm.wait_job(job)
            assert (state["JobState"], state["JobName"]) == ("COMPLETED", "wandb-sweep"), logs(place, job)
            assert Path(state["StdErr"]) == place / "logs" / f"sweep_{job}.err"
        assert slurm.job(preempted)["Restarts"] == "1"
        assert server.unknown == []
    trials = server.sweeps["sweep0"].trials
    assert {(t.args["learning_rate"], t.args["tail_say_weight"]) for t in trials} == {(r, w) for r in (1e-2, 1e-3) for w in (0.0, 1.0)}
    assert len(trials) == 4
    for trial in trials:
        run = place / "outputs" / f"tiny-{trial.id}"
        assert [line["step"] for line in read_curve(run / "metrics.jsonl") if "train/loss" in line] == list(range(1, 251))
        assert json.loads((run / "last" / "trainer.json").read_text())["progress"]["wandb_run"] == trial.id
        assert json.loads((run / "last" / "lens.json").read_text())["config"]["learning_rate"] == trial.args["learning_rate"]
        assert any(record.HasField("preempting") for record in records(place, trial.id)) == (trial.id == "sweep0run0")


def environment_of(job):
    """The environments of a job's processes, as text."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            text = entry.read_text(errors="replace")
            if f"SLURM_JOB_ID={job}\0" in text:
                found.append(text)
    return "".join(found)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["abc123def", "1"], "'abc123def' is no sweep; give ENTITY/PROJECT/SWEEP_ID"),
        (["a/b/c", "none"], "COUNT='none' must be a number of trials"),
    ],
)
def test_an_agent_refuses_what_is_no_sweep_in_one_line(place, arguments, error):
    done = subprocess.run(["bash", "slurm/sweep_agent.sbatch", *arguments], cwd=place, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {error}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments, error", [(["no.yaml", "2"], "there is no sweep file 'no.yaml'"), (["sweep.yaml"], "N='' must be")])
def test_a_sweep_is_not_submitted_without_its_file_and_number(place, arguments, error):
    (place / "sweep.yaml").write_text(SWEEP)
    done = subprocess.run(["bash", "slurm/submit_sweep.sh", *arguments], cwd=place, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {error}")
