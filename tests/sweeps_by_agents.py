"""Whole sweeps by `wandb sweep` and `wandb agent`, the installed client unmodified, against a stand-in of the server, with real trainings.

    python -m pytest -o addopts= tests/sweeps_by_agents.py

Minutes: an agent looks for work every five seconds. Its small version, which always runs, is test_wandb_agent.py.
"""

import json
import re
import signal
import struct
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from wandb.proto import wandb_internal_pb2

from megalens.sweep.file import read_sweep
from megalens.track import read_curve

METRIC = "train/loss"
SWEEP = """
program: {program}
method: {method}
metric: {{name: train/loss, goal: minimize}}
parameters:
  learning_rate: {rates}
  alpha_schedule.value: {{value: 0.2}}
  config: {{value: conf/tiny.yaml}}
  max_train_steps: {{value: {steps}s}}
  wandb.mode: {{value: offline}}
"""
RANGE = "{min: 1.0e-4, max: 1.0e-2, distribution: log_uniform_values}"


@pytest.fixture
def server(wandb_server, dumped_checkout, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    wandb_server.metric_of = lambda run_id, name: logged(dumped_checkout, run_id).get(name)
    return wandb_server


def write(folder, method, rates, steps=4, program="megalens/train.py"):
    path = folder / f"{method}.yaml"
    path.write_text(SWEEP.format(method=method, rates=rates, steps=steps, program=program))
    return path


def wandb(*arguments):
    """Run the client; returns what it printed."""
    done = subprocess.run(["wandb", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def create(file):
    """`wandb sweep FILE`; returns ENTITY/PROJECT/SWEEP_ID."""
    return re.search(r"wandb agent (\S+)", wandb("sweep", str(file)))[1]


def agent(*arguments):
    """Start `wandb agent` beside others; its output goes to a file of its own."""
    log = open(f"agent-{time.monotonic_ns()}.log", "w")  # noqa: SIM115 - the agent's
    return subprocess.Popen(["wandb", "agent", *arguments], stdout=log, stderr=log)


def logged(folder, run_id):
    """The last figures that an offline W&B run of this id holds, read from W&B's own file; {} when it holds none."""
    figures = {}
    for file in sorted(folder.glob(f"outputs/*/wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            figures |= {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
    return figures


def records(content):
    """The records of a .wandb file: behind 7 bytes of head LevelDB's log, blocks of 32 KiB with (checksum, length, kind) chunks."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (1 << 15) - at % (1 << 15) < 7:  # the rest of a block is padding
            at += (1 << 15) - at % (1 << 15)
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def losses(curve):
    """The sweep's metric over a training."""
    return [line[METRIC] for line in read_curve(curve) if METRIC in line]


def rates(sweep):
    return [trial.args["learning_rate"] for trial in sweep.trials]


def test_grid_random_and_bayes_by_agents_at_the_same_time(server, dumped_checkout):
    grid, random, bayes = (
        create(write(dumped_checkout, method, values))
        for method, values in [("grid", "{values: [1.0e-2, 1.0e-3, 1.0e-4]}"), ("random", RANGE), ("bayes", RANGE)]
    )
    agents = [agent(grid), agent(grid), agent("--count", "1", random), agent("--count", "3", bayes)]
    assert [process.wait(timeout=280) for process in agents] == [0, 0, 0, 0]
    grid, random, bayes = server.sweeps.values()
    assert sorted(rates(grid)) == [1e-4, 1e-3, 1e-2], "two agents, each point once"
    assert [len(random.trials), len(bayes.trials)] == [1, 3]
    for trial in [*grid.trials, *random.trials, *bayes.trials]:
        assert len(list(dumped_checkout.glob(f"outputs/tiny-{trial.id}/last"))) == 1, "a run folder of its own"
        about = json.loads((dumped_checkout / "outputs" / f"tiny-{trial.id}" / "last" / "lens.json").read_text())
        assert about["config"]["learning_rate"] == trial.args["learning_rate"]
        assert about["config"]["alpha_schedule"]["value"] == 0.2
        figures = logged(dumped_checkout, trial.id)
        assert figures[METRIC] == pytest.approx(losses(f"outputs/tiny-{trial.id}/metrics.jsonl")[-1])
        assert {"val/loss", "val/fve_nrm", "val/kl_recovered"} <= figures.keys()
    assert sum(trial.metric is not None for trial in bayes.trials) >= 2, "the metric arrives, and the search goes by it"
    assert server.unknown == []


def test_a_preempted_trial_goes_on_in_its_own_run_from_its_own_checkpoint(server, dumped_checkout):
    name = create(write(dumped_checkout, "grid", "{values: [1.0e-3]}", steps=200))
    first = agent("--forward-signals", name)
    curve = dumped_checkout / "outputs" / "tiny-sweep0run0" / "metrics.jsonl"
    while not curve.exists() or len(curve.read_text().splitlines()) < 20:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # as Slurm does when it takes the job's node away
    first.wait(timeout=100)
    stopped = json.loads((curve.parent / "last" / "trainer.json").read_text())["progress"]
    assert 0 < stopped["step"] < 200
    server.requeue("sweep0run0")
    assert agent(name).wait(timeout=200) == 0
    finished = json.loads((curve.parent / "last" / "trainer.json").read_text())["progress"]
    assert (finished["step"], finished["wandb_run"]) == (200, "sweep0run0")
    steps = [line["step"] for line in read_curve(curve) if METRIC in line]
    assert steps == list(range(1, 201)), "neither repeated nor left out"
    assert [trial.state for trial in server.sweeps["sweep0"].trials] == ["finished"]


def test_the_worked_example_from_preparation_to_the_best_learning_rate(server, checkout, monkeypatch):
    """Prepare the data, create the sweep, one agent per job with --count 1, find the best; then the same without a server."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pipeline = [sys.executable, "tools/run_pipeline.py", "config=conf/tiny.yaml"]
    subprocess.run([*pipeline, "max_train_steps=1s"], check=True)
    file = write(checkout, "grid", "{values: [1.0e-2, 1.0e-5]}", steps=10)
    name = create(file)
    jobs = [agent("--count", "1", name) for _ in range(2)]
    assert [job.wait(timeout=200) for job in jobs] == [0, 0]
    found = {trial.args["learning_rate"]: logged(checkout, trial.id)[METRIC] for trial in server.sweeps["sweep0"].trials}
    assert min(found, key=found.get) == 1e-2
    offline = subprocess.run([sys.executable, "tools/sweep_offline.py", str(file), "--jobs", "2"], capture_output=True, text=True)
    assert offline.returncode == 0, offline.stderr
    best = offline.stdout.splitlines()[1].split()
    assert best[1] == "0.01"
    assert float(best[2]) == pytest.approx(found[1e-2], rel=1e-3)
    assert "learning_rate=0.01" in re.search(r"^best: (.*)$", offline.stdout, flags=re.MULTILINE)[1]


def test_a_wrong_parameter_ends_the_trial_with_one_line_before_anything_loads(server, dumped_checkout):
    file = write(dumped_checkout, "grid", "{values: [1.0e-3]}")
    file.write_text(file.read_text().replace("learning_rate:", "learning_rat:"))
    output = wandb("agent", "--count", "1", create(file))
    assert "error: unknown key 'learning_rat' in the command line; did you mean 'learning_rate'?" in output
    assert "Traceback" not in output


def test_the_commands_of_the_docs_run_as_printed(server, checkout):
    docs = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"^```yaml\n(.*?)^```", docs, flags=re.MULTILINE | re.DOTALL)
    (checkout / "printed.yaml").write_text(printed)
    assert read_sweep(checkout / "printed.yaml").searched == ["batch_size", "learning_rate"]
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```", docs, flags=re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 5
    name = ""
    for command in commands:
        done = subprocess.run(["bash", "-c", command.replace("ENTITY/PROJECT/SWEEP_ID", name)], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        if found := re.search(r"wandb agent (\S+)", done.stderr):
            name = found[1]
    assert [trial.args["learning_rate"] for trial in server.sweeps["sweep0"].trials] == [1e-2]
    assert done.stdout.count("finished") == 2
    for path in re.findall(r"`((?:tools|slurm|benchmarks|conf|sweeps)/[\w./]+?)`", docs):
        assert (ROOT / path).exists(), path
