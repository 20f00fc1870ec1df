"""Sweeps with no server: real trainings, shared, killed and taken up again; and with a stand-in training what is decided when."""

import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from optuna.trial import TrialState

from megalens.commands import sweep as sweep_command
from megalens.config import load_config
from megalens.schedule import parse_duration
from megalens.sweep import SweepError
from megalens.sweep.file import read_sweep
from megalens.sweep.offline import Workers, visible_gpus
from megalens.sweep.search import Search, point_of
from megalens.training.track import read_curve

SWEEP = """
program: {program}
method: {method}
metric: {{name: val/loss, goal: minimize}}
{more}
parameters:
  {searched}
  config: {{value: conf/tiny.yaml}}
  max_train_steps: {{value: 8s}}
  validation.interval: {{value: 1s}}
"""
# A training of no time: its loss is |t_text - 4| + 1 / step. It honours early_termination.steps and can fail, or wait to be stopped.
STAND_IN = """
import json, os, signal, sys, time
from megalens.config import load_config
from megalens.schedule import parse_duration
from megalens.sweep.trial import any_sweep
config = load_config(sys.argv[1:])
config.run_dir.mkdir(parents=True, exist_ok=True)
if config.t_text == 9:
    sys.exit("error: t_text=9 is too much")
if os.environ.get("TRIAL_WAITS"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(60)
last = min(8, int(parse_duration(config.early_termination.steps or "8s")[0]))
with open(config.run_dir / "metrics.jsonl", "w") as file:
    for step in range(1, last + 1):
        file.write(json.dumps({"step": step, "val/loss": abs(config.t_text - 4) + 1 / step}) + "\\n")
shown = [last, os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), any_sweep()]
open(config.run_dir / "started", "a").write(" ".join(map(str, shown)) + "\\n")
"""


@pytest.fixture
def sweep_file(dumped_checkout, monkeypatch):
    """Write a sweep file; the environment is one in which its trials can run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (dumped_checkout / "stand_in.py").write_text(STAND_IN)

    def write(searched, method="grid", program="stand_in.py", more="", name="sweep"):
        path = dumped_checkout / f"{name}.yaml"
        path.write_text(SWEEP.format(program=program, method=method, searched=searched, more=more))
        return path

    return write


def start(*arguments):
    command = [sys.executable, "tools/sweep_offline.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers(file, count=None, jobs=1, folder="outputs/sweeps/sweep"):
    search = Search(read_sweep(file), file.parent / folder, count)
    return search, Workers(search, jobs, lambda line: None, lambda: None)


def starts(number):
    """The trainings of a trial that were started."""
    return Path(f"outputs/sweeps/sweep/trial-{number}.log").read_text().count("\n$ ") + 1


def started(number):
    """What the stand-in of a trial's training noted at each start."""
    return Path(f"outputs/sweep-{number:03d}/started").read_text().splitlines()


def test_trials_that_end_together_write_the_report_one_after_the_other(sweep_file, monkeypatch):
    _, work = workers(sweep_file("t_text: {values: [1, 2, 3, 4]}"), jobs=2)
    both, writing, together = threading.Barrier(2), [], []

    def write():
        writing.append(1)
        together.append(len(writing))
        time.sleep(0.2)
        writing.pop()

    monkeypatch.setattr(work, "_try", lambda claim, slot: (claim.end(TrialState.COMPLETE, 1.0), claim.leave(), both.wait(60)))
    work.ended = write
    assert work.run() == 0
    assert together == [1, 1, 1, 1]


def test_a_grid_of_trainings_killed_and_shared_by_two_processes_runs_each_trial_once(sweep_file, dumped_checkout):
    file = sweep_file("learning_rate: {values: [1.0e-2, 1.0e-3, 1.0e-5]}\n  wandb.mode: {value: offline}", program="megalens/train.py")
    doomed = start(file)
    for line in doomed.stderr:
        if line.startswith("[sweep] trial 1:"):
            break
    time.sleep(2)
    doomed.kill()
    doomed.communicate()
    both = [start(file), start(file)]
    printed = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert starts(0) == 1, "finished before the kill, and not run again"
    assert starts(1) == 2, "killed, and taken up again"
    assert starts(2) == 1
    for number in range(3):
        assert read_curve(f"outputs/sweep-{number:03d}/metrics.jsonl")[-1]["step"] == 8
        assert list((dumped_checkout / "outputs" / f"sweep-{number:03d}" / "wandb").glob("offline-run-*")), "logged to W&B offline"
    out = printed[0][0]
    assert out == printed[1][0]
    assert [line.split()[-1] for line in out.splitlines()[1:4]] == ["finished"] * 3
    losses = [float(line.split()[2]) for line in out.splitlines()[1:4]]
    assert losses == sorted(losses)
    best = shlex.split(re.search(r"^best: (.*)$", out, flags=re.MULTILINE)[1])
    assert best[:2] == ["python", "megalens/train.py"]
    assert f"{load_config(best[2:]).learning_rate:g}" == f"{float(out.splitlines()[1].split()[1]):g}"


def test_hyperband_ends_weak_trials_at_a_look_and_strong_ones_go_on_from_there(sweep_file):
    more = "early_terminate: {type: hyperband, min_iter: 2, eta: 2}"
    search, at_work = workers(sweep_file("t_text: {values: [2, 3, 4, 5, 6, 7]}", "random", more=more), count=8)
    assert at_work.run() == 0
    spent = {t.number: [int(line.split()[0]) for line in started(t.number)] for t in search.trials()}
    ends = {t.number: t.state for t in search.trials()}
    assert set(ends.values()) == {TrialState.COMPLETE, TrialState.PRUNED}
    for number, state in ends.items():
        assert spent[number] == ([2, 4, 8] if state == TrialState.COMPLETE else [2, 4, 8][: len(spent[number])])
        assert (spent[number][-1] == 8) == (state == TrialState.COMPLETE)
    assert sum(steps[-1] for steps in spent.values()) < 0.7 * 8 * 8, "of so few trials the first are let through"
    assert search.best().value == min(t.user_attrs["value"] for t in search.trials() if t.state == TrialState.COMPLETE)


@pytest.mark.parametrize("source", ["on_the_fly", "mix"])
def test_a_look_needs_no_dump_of_the_trials_own(sweep_file, dumped_checkout, source):
    folder = load_config(["config=conf/tiny.yaml"]).activation_dir("train")
    rows = {"on_the_fly": "on_the_fly: {value: true}", "mix": f"mix: {{value: ['{folder}=1.0']}}"}[source]
    more = "early_terminate: {type: hyperband, min_iter: 2, eta: 2}"
    file = sweep_file(f"t_text: {{values: [3]}}\n  {rows}\n  activation_dumper.root: {{value: nowhere}}", "random", more=more)
    search, at_work = workers(file, count=1)
    claim = search.claim()
    assert [at_work._is_at_end(claim, until) for until in ("2s", "8s")] == [False, True]


def test_trials_at_a_time_share_gpus_and_cores(sweep_file, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert visible_gpus() == ["4", "5", "6", "7"]
    _, at_work = workers(sweep_file("t_text: {values: [2, 3]}"), jobs=2)
    assert at_work.run() == 0
    seen = {tuple(started(number)[0].split()[1:3]) for number in range(2)}
    assert seen <= {("3", "4,5"), ("3", "6,7")}
    (sweep_name,) = {started(number)[0].split()[3] for number in range(2)}
    assert re.fullmatch("sweep-[0-9a-f]{8}", sweep_name), "trials know that they are of one sweep, and redump once"


def test_a_failing_trial_is_told_and_the_others_go_on(sweep_file):
    search, at_work = workers(sweep_file("t_text: {values: [9, 4]}"))
    assert at_work.run() == 0
    failed, finished = search.trials()
    assert (failed.state, failed.user_attrs["error"]) == (TrialState.FAIL, "t_text=9 is too much")
    assert (finished.state, point_of(finished)) == (TrialState.COMPLETE, {"t_text": 4})


def test_when_every_trial_fails_it_stops_with_their_error(sweep_file):
    _, at_work = workers(sweep_file("t_text: {value: 9}\n  seed: {values: [1, 2, 3, 4, 5]}"))
    with pytest.raises(SweepError, match=r"the first 3 trials failed, the last with: t_text=9 is too much \(see .*trial-2.log\); mend it"):
        at_work.run()


def test_a_metric_that_no_trial_measures_ends_the_sweep_with_those_that_are(sweep_file):
    file = sweep_file("t_text: {values: [3, 4]}")
    file.write_text(file.read_text().replace("val/loss", "val/los"))
    search, at_work = workers(file)
    with pytest.raises(SweepError, match=r"metric\.name: val/los is not among the figures that trial 0 logs \(val/loss\); mend"):
        at_work.run()
    assert len(search.trials()) == 1


def test_a_training_that_does_not_measure_the_metric_is_stopped_before_its_end(sweep_file, dumped_checkout, monkeypatch):
    waits = STAND_IN.replace("shown = [last", "file.close()\ntime.sleep(300)\nshown = [last")
    file = sweep_file("t_text: {values: [3]}")
    (dumped_checkout / "stand_in.py").write_text(waits)
    file.write_text(file.read_text().replace("val/loss", "val/los"))
    _, at_work = workers(file)
    with pytest.raises(SweepError, match="val/los is not among the figures"):
        at_work.run()
    assert not Path("outputs/sweep-000/started").exists()


def test_looks_at_large_numbers_of_steps_are_exact(sweep_file):
    more = "early_terminate: {type: hyperband, min_iter: 4, eta: 2}"
    file = sweep_file("t_text: {values: [3]}", "random", more=more)
    file.write_text(file.read_text().replace("validation.interval: {value: 1s}", "validation.interval: {value: 308643s}"))
    search, at_work = workers(file, count=1)
    looks = at_work._looks(search.claim())
    assert [next(looks) for _ in range(3)] == [(4, "1234572s"), (8, "2469144s"), (16, "4938288s")]
    assert all(parse_duration(until)[0] % 308643 == 0 for _, until in [next(looks)])


def test_a_stopped_sweep_leaves_its_trial_and_the_same_command_goes_on(sweep_file, monkeypatch):
    file = sweep_file("t_text: {values: [3]}")
    monkeypatch.setenv("TRIAL_WAITS", "1")
    stopped = start(file)
    assert stopped.stderr.readline().startswith("[sweep] trial 0")
    time.sleep(3)
    stopped.send_signal(signal.SIGTERM)
    assert "the same command goes on from here" in stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 143
    monkeypatch.delenv("TRIAL_WAITS")
    done = start(file)
    assert done.communicate(timeout=60)[0].splitlines()[1].split() == ["0", "3", "1.125", "finished"]
    assert starts(0) == 2


def test_what_cannot_run_is_refused_before_a_trial(sweep_file, dumped_checkout, monkeypatch):
    def refused(file):
        with pytest.raises(ValueError) as caught:
            sweep_command.main([str(file)])
        return str(caught.value)

    assert "program: none.py does not exist here" in refused(sweep_file("t_text: {values: [3]}", program="none.py"))
    layer = sweep_file("t_text: {values: [3]}\n  layer_l: {value: 1}", program="megalens/train.py")
    assert "python tools/dump_acts.py" in refused(layer)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert "a dead GPU or driver (try nvidia-smi)" in refused(sweep_file("t_text: {values: [3]}"))
    assert not (dumped_checkout / "outputs").exists()


def test_the_page_stands_alone_and_escapes_what_comes_from_files(sweep_file, capsys):
    prompts = '["A <act> b", "</code><script>x</script><act>", "C<act>", "D<act>", "E<act>"]'
    file = sweep_file(f"verbalizer.prompt: {{values: {prompts}}}\n  t_text: {{value: 4}}")
    assert sweep_command.main([str(file)]) == 0
    page = Path("outputs/sweeps/sweep/report.html").read_text()
    assert "<script>x" not in page
    assert "&lt;script&gt;x" in page
    assert page.count("<polyline") == 10, "five trials as lines of the coordinates and as curves"
    assert not re.search(r"(src|href)=|https?://", page.replace("http://www.w3.org/2000/svg", ""))
    printed = capsys.readouterr().out
    assert "page: outputs/sweeps/sweep/report.html" in printed
    assert sweep_command.main([str(file), "--show"]) == 0
    assert capsys.readouterr().out == printed
