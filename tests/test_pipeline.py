"""The pipeline: which stages run, with which settings, and what a stop or a failure leaves."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from megalens.commands import pipeline
from megalens.config import ConfigError
from megalens.files import Lock
from megalens.pipeline import run as pipeline_run
from megalens.pipeline.stages import DataStage, phases_of

STAGE = """
import os, pathlib, signal, sys, time
log = pathlib.Path(os.environ["STAGE_LOG"])
name = sys.argv.pop(1)
def note(text): log.open("a").write(f"{name} {text}\\n")
def stop(number, frame):
    note("stopped cleanly")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
shown = [str(os.environ.get(name)) for name in os.environ.get("STAGE_SHOWS", "").split()]
note(" ".join([*sys.argv[1:], *shown]))
if os.environ.get("STAGE_FAILS") == name:
    sys.exit("error: the disk is full")
if os.environ.get("STAGE_WAITS") == name:
    time.sleep(60)
"""

DRIVER = """
import sys
from megalens import cli
from megalens.commands import pipeline
from megalens.pipeline import run
from megalens.pipeline.stages import DataStage
run.data_command = run.train_command = lambda name: [sys.executable, sys.argv[1], name if isinstance(name, str) else "train"]
run.data_stages = lambda config: [DataStage("pretokenize", config.pretokenized_dir, lambda: "is missing")]
cli.run(pipeline.main, "", ["config=conf/tiny.yaml"])
"""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A program in the place of every stage: it logs its name, its arguments and how it ended."""
    path = tmp_path / "stage.py"
    path.write_text(STAGE)
    return path


@pytest.fixture
def stages(checkout, stand_in, tmp_path, monkeypatch):
    """Stand-ins for the stage commands; calling it gives the lines they logged."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("STAGE_LOG", str(log))
    monkeypatch.setattr(pipeline_run, "data_command", lambda name: [sys.executable, str(stand_in), name])
    monkeypatch.setattr(pipeline_run, "train_command", lambda config: [sys.executable, str(stand_in), "train"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield lambda: log.read_text().splitlines()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def reasons(monkeypatch, pretokenized, dumped):
    def data_stages(config):
        yield DataStage("pretokenize", config.pretokenized_dir, lambda: pretokenized)
        yield DataStage("dump", config.activation_dir("train"), lambda: dumped)

    monkeypatch.setattr(pipeline_run, "data_stages", data_stages)


# -------------------------------------------------------------------------------------------------------------- the plan


def test_a_plain_config_is_one_training(checkout):
    (phase,) = phases_of(["config=conf/tiny.yaml", "--learning_rate=1e-4", "force_redump=true"])
    assert phase.arguments == ["config=conf/tiny.yaml", "learning_rate=1e-4"]
    assert phase.config.force_redump


def test_the_warm_start_named_by_init_from_runs_first(checkout):
    warm, final = phases_of(["config=conf/tiny_from_warmstart.yaml"])
    assert (warm.config.run_name, final.config.run_name) == ("tiny_warmstart", "tiny_from_warmstart")


def test_settings_of_data_and_lens_reach_the_warm_start_and_those_of_the_training_do_not(checkout):
    shared = ["t_text=3", "dataset.min_words=7", "engine=auto", "fsdp.gather_gb=1", "on_the_fly=true", "mix=[]"]
    shared += ["verbalizer.mode=full", "reconstructor.mode=frozen", "verbalizer.lora.r=3"]
    settings = [*shared, "learning_rate=1e-5", "run_name=other", "seed=1"]
    warm, final = phases_of(["config=conf/tiny_from_warmstart.yaml", *settings, "--deepspeed", "z1.json"])
    assert final.arguments[1:] == [*settings, "deepspeed=z1.json"]
    assert warm.arguments == ["config=conf/tiny_warmstart.yaml", *shared, "deepspeed=z1.json"]
    assert warm.config.t_text == 3


def test_a_chain_of_warm_starts_runs_from_its_beginning(checkout, tmp_path):
    middle = tmp_path / "middle.yaml"
    middle.write_text("init_from: conf/tiny_warmstart.yaml")
    phases = phases_of(["config=conf/tiny_from_warmstart.yaml", f"init_from={middle}"])
    assert [phase.config.run_name for phase in phases] == ["tiny_warmstart", "middle", "tiny_from_warmstart"]


def test_a_chain_that_leads_back_to_itself_is_refused(checkout, tmp_path):
    loop = tmp_path / "loop.yaml"
    loop.write_text(f"init_from: {loop}")
    with pytest.raises(ConfigError, match=r"init_from leads back to .*loop.yaml"):
        phases_of([f"config={loop}"])


def test_a_checkpoint_to_start_from_is_no_phase(checkout):
    assert len(phases_of(["config=conf/tiny.yaml", "init_from=outputs/x/best"])) == 1


def test_deepspeed_is_started_by_its_own_launcher(checkout, monkeypatch):
    monkeypatch.setattr(pipeline_run.shutil, "which", lambda name: f"/usr/bin/{name}")
    (phase,) = phases_of(["config=conf/tiny.yaml", "--deepspeed", "z1.json"])
    launcher = pipeline_run.train_command(phase.config)
    assert Path(launcher[0]).name == "deepspeed"
    assert Path(launcher[-1]).name == "train.py"


def test_fsdp_is_started_on_every_gpu(checkout, monkeypatch, capsys):
    (phase,) = phases_of(["config=conf/tiny.yaml", "engine=fsdp"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    *launcher, script = pipeline_run.train_command(phase.config)
    assert launcher == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert Path(script).name == "train.py"
    assert capsys.readouterr().err == ""
    for changed in (lambda: monkeypatch.setattr(torch.cuda, "device_count", lambda: 1), lambda: setattr(phase.config, "device", "cpu")):
        changed()
        assert pipeline_run.train_command(phase.config) == [sys.executable, script]
        assert capsys.readouterr().err == "[pipeline] engine=fsdp: in one process, which shards nothing; this machine shows no second GPU\n"


# ------------------------------------------------------------------------------------------------------------ the stages


def test_what_is_valid_is_reused_and_what_is_not_is_made(stages, monkeypatch, capfd):
    reasons(monkeypatch, None, "val split: the dump is of layer 1")
    pipeline.main(["config=conf/tiny.yaml", "seed=3"])
    assert stages() == ["dump config=conf/tiny.yaml seed=3", "train config=conf/tiny.yaml seed=3"]
    said = capfd.readouterr().err
    assert "data/pretokenized/tiny/tiny-llama: not needed, as what is made of it is valid" in said
    assert "data/activations/tiny-llama/layer_2/tiny_train: val split: the dump is of layer 1" in said


def test_force_redump_makes_the_data_anew_once(stages, monkeypatch):
    reasons(monkeypatch, None, None)
    pipeline.main(["config=conf/tiny_from_warmstart.yaml", "force_redump=true"])
    assert stages() == [
        "pretokenize config=conf/tiny_warmstart.yaml force_redump=true",
        "dump config=conf/tiny_warmstart.yaml force_redump=true",
        "train config=conf/tiny_warmstart.yaml",
        "train config=conf/tiny_from_warmstart.yaml",
    ]


def test_a_sweeps_trials_redump_once_and_train_in_folders_of_their_own(stages, monkeypatch, capfd):
    reasons(monkeypatch, None, None)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    for trial in ("one", "two"):
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        pipeline.main(["config=conf/tiny_from_warmstart.yaml", "force_redump=true"])
        assert f"outputs/tiny_from_warmstart-{trial}/best" in capfd.readouterr().err
    assert [line.split()[0] for line in stages()] == ["pretokenize", "dump", "train", "train", "train", "train"]
    assert (stages()[0].split()[-1], stages()[1].split()[-1]) == ("force_redump=true", "force_redump=true")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep2")
    pipeline.main(["config=conf/tiny_from_warmstart.yaml", "force_redump=true"])
    assert [line.split()[0] for line in stages()[6:]] == ["pretokenize", "dump", "train", "train"]


def test_a_warm_start_is_no_trial_of_the_sweep_and_the_training_is(stages, monkeypatch):
    reasons(monkeypatch, None, None)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    monkeypatch.setenv("STAGE_SHOWS", "WANDB_RUN_ID")
    pipeline.main(["config=conf/tiny_from_warmstart.yaml"])
    assert stages() == ["train config=conf/tiny_warmstart.yaml None", "train config=conf/tiny_from_warmstart.yaml one"]


def test_one_pipeline_makes_the_data_and_the_other_waits_and_reuses_it(stages, checkout, monkeypatch, capfd):
    made = checkout / "made"
    monkeypatch.setattr(pipeline_run, "data_stages", lambda config: [DataStage("dump", made, lambda: None if made.exists() else "?")])
    lock = Lock(checkout / ".made.pipeline")
    lock.acquire(wait=True)

    def other_pipeline():
        wait_until(lambda: "waiting" in (said.append(capfd.readouterr().err) or "".join(said)))
        made.mkdir()
        lock.release()

    said = []
    other = threading.Thread(target=other_pipeline)
    other.start()
    pipeline.main(["config=conf/tiny.yaml"])
    other.join()
    assert stages() == ["train config=conf/tiny.yaml"]


def test_a_failing_stage_ends_the_pipeline_with_its_error_and_code(stages, monkeypatch, capfd):
    reasons(monkeypatch, "is missing", "is missing")
    monkeypatch.setenv("STAGE_FAILS", "dump")
    with pytest.raises(SystemExit) as caught:
        pipeline.main(["config=conf/tiny.yaml"])
    assert caught.value.code == 1
    assert [line.split()[0] for line in stages()] == ["pretokenize", "dump"]
    assert "error: the disk is full" in capfd.readouterr().err


def start_and_wait_for(stage, stages, stand_in, monkeypatch):
    monkeypatch.setenv("STAGE_WAITS", stage)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = subprocess.Popen([sys.executable, "-c", DRIVER, str(stand_in)], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any(line.startswith(stage) for line in stages()))
    return started


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_lets_the_stage_finish_cleanly_and_starts_no_other(number, stages, stand_in, monkeypatch):
    started = start_and_wait_for("pretokenize", stages, stand_in, monkeypatch)
    started.send_signal(number)
    assert "the same command goes on from here" in started.communicate()[1]
    assert started.returncode == 128 + number
    assert stages() == ["pretokenize config=conf/tiny.yaml", "pretokenize stopped cleanly"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_a_killed_pipeline_leaves_no_stage_at_work(stages, stand_in, monkeypatch):
    started = start_and_wait_for("train", stages, stand_in, monkeypatch)
    started.kill()
    started.communicate()
    wait_until(lambda: stages()[-1] == "train stopped cleanly")


# ------------------------------------------------------------------------------------------------------- the real stages


def run(*arguments):
    command = [sys.executable, "tools/run_pipeline.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_phases_train_from_nothing_and_again_reuse_everything(checkout):
    first = run("config=conf/tiny_from_warmstart.yaml")
    assert first.returncode == 0, first.stderr
    for name in ("tiny_warmstart", "tiny_from_warmstart"):
        assert (checkout / "outputs" / name / "best" / "lens.safetensors").is_file()
    again = run("config=conf/tiny_from_warmstart.yaml")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("valid, reusing it") == 4


def test_a_wrong_setting_is_one_line_before_anything_starts(checkout):
    result = run("config=conf/tiny.yaml", "learning_rat=1")
    assert result.returncode == 1
    assert result.stderr.strip() == "error: unknown key 'learning_rat' in the command line; did you mean 'learning_rate'?"
    assert not (checkout / "outputs").exists()
