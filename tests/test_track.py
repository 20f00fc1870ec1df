"""Curves, console and W&B."""

import json
import os
import signal
import subprocess
import time

import pytest
from tiny_run import tiny_config
from wandb_client import records

from megalens.config import Wandb
from megalens.training.track import Console, Curve, Tracker, TrackingError, read_curve


def test_curve_cut_to_the_lines_that_count_goes_on_exactly_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    curve = Curve(path)
    for step in (1, 2, 3):
        curve.log(step, {"loss": 1 / step})
    curve.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # the line a kill cut off
    curve = Curve(path, lines=2)
    curve.log(3, {"loss": 0.5})
    curve.close()
    assert read_curve(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}]
    assert curve.lines == 3


def test_figures_come_back_to_the_last_bit(tmp_path):
    curve = Curve(tmp_path / "m.jsonl")
    curve.log(1, {"x": 0.1 + 0.2})
    curve.close()
    assert read_curve(tmp_path / "m.jsonl")[0]["x"] == 0.1 + 0.2


def test_console_without_a_terminal_prints_lines_not_a_bar(capsys):
    console = Console("run", total=4, done=0)
    for step in range(1, 5):
        console.advance(step, loss=step / 10, fve=0.5)
    console.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["run 1/4 loss 0.1 fve 0.5", "run 4/4 loss 0.4 fve 0.5"]


def test_disabled_tracker_needs_no_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    tracker = Tracker(tiny_config(tmp_path))
    tracker.log(1, {"loss": 1.0})
    tracker.examples(1, [{"context": "a", "explanation": "b", "fve": 0.1}])
    tracker.close()
    assert tracker.run_id is None


def test_offline_tracker_writes_under_the_runs_folder_and_a_resume_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    config = tiny_config(tmp_path, wandb=Wandb(mode="offline"))
    tracker = Tracker(config)
    tracker.log(2, {"train/loss": 1.0})
    tracker.examples(2, [{"context": "a", "explanation": "b", "fve": 0.1}])
    tracker.close()
    again = Tracker(config, tracker.run_id)
    again.close()
    assert again.run_id == tracker.run_id
    runs = list((config.run_dir / "wandb").glob("offline-run-*"))
    assert runs
    assert all(tracker.run_id in path.name for path in runs)


@pytest.mark.parametrize("kind", ["UsageError", "CommError", "AuthenticationError"])
def test_online_tracker_that_cannot_log_in_says_how_to_go_on_in_one_line(tmp_path, monkeypatch, kind):
    import wandb

    def refuse(**_):
        raise getattr(wandb.errors, kind)("no\n answer")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(TrackingError, match=r"\(no answer\); log in with `wandb login`, or set wandb.mode=offline"):
        Tracker(tiny_config(tmp_path, wandb=Wandb(mode="online")))


@pytest.mark.parametrize("variables, marked", [({"WANDB_SWEEP_ID": "s", "SLURM_JOB_ID": "1"}, True), ({"WANDB_SWEEP_ID": "s"}, False)])
def test_a_trial_that_its_slurm_job_takes_down_asks_to_be_handed_out_again(tmp_path, monkeypatch, variables, marked):
    import wandb

    calls = []
    monkeypatch.setattr(wandb.Run, "mark_preempting", lambda run: calls.append(run.id))
    for name, value in {"WANDB_RUN_ID": "trial7", **variables}.items():
        monkeypatch.setenv(name, value)
    Tracker(tiny_config(tmp_path, wandb=Wandb(mode="offline"))).close(128 + signal.SIGTERM)
    assert calls == ["trial7"] * marked


def test_a_training_outlives_wandbs_service_and_still_asks_to_be_handed_out_again(tmp_path, monkeypatch, capsys):
    """Slurm sends SIGTERM to every process of a job, W&B's own service too."""
    for name, value in {"WANDB_RUN_ID": "trial8", "WANDB_SWEEP_ID": "s", "SLURM_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker(tiny_config(tmp_path, wandb=Wandb(mode="offline")))
    (service,) = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout.split()
    time.sleep(1.1)  # W&B names a run's folder by the second
    os.kill(int(service), signal.SIGTERM)
    until = time.monotonic() + 60
    while "service has ended" not in capsys.readouterr().err:
        tracker.log(3, {"train/loss": 0.25})
        assert time.monotonic() < until
        time.sleep(0.05)
    tracker.log(4, {"train/loss": 0.125})
    tracker.close(128 + signal.SIGTERM)
    while not any(record.HasField("preempting") for record in records(tmp_path, "trial8")):  # its service writes after finish() returns
        assert time.monotonic() < until
        time.sleep(0.1)


def test_configuration_is_logged_whole(tmp_path, monkeypatch):
    import wandb

    seen = {}
    start = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: seen.update(options) or start(**options))
    config = tiny_config(tmp_path, wandb=Wandb(mode="offline"))
    Tracker(config).close()
    assert seen["config"]["learning_rate"] == 0.01
    assert seen["config"]["lora"]["r"] == 2
    json.dumps(seen["config"])
