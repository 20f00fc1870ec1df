"""The command itself: by path, under the launchers, killed and called again, and what it refuses."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from endure import change_engines
from launched import ALL_TERMS, ROOT, TEN_STEPS, TORCHRUN, TRAIN, curve, free_port, killed_at, make_place, run, run_quickly, run_ranks
from safetensors.torch import load_file

from megalens import cli
from megalens.config import load_config
from megalens.engine import EngineError
from megalens.pipeline.default_experiment import with_experiment
from megalens.train import main
from megalens.training.ready import check_ready
from megalens.training.start import sole_training


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_dump):
    """A user's folder in which conf/tiny.yaml's activations are dumped."""
    return make_place(tmp_path_factory.mktemp("place"), tiny_dump)


def train(folder, *arguments, code=0):
    return run_quickly(folder, [*TRAIN, *arguments], code)


def refused(folder, *arguments, ranks=1):
    """The one line of an error, of a command."""
    said = run_ranks(folder, ranks, [*TRAIN, *arguments], code=1)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


@pytest.fixture
def here(place, monkeypatch):
    """The command without a new process: what it prints on stderr, or the error it would print."""
    monkeypatch.chdir(place)

    def call(*arguments):
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            try:
                assert main(list(arguments)) == 0
            except (ValueError, OSError) as error:
                assert cli.told(error), error
                return "\n".join(cli.told(error))
        return printed.getvalue()

    return call


# ------------------------------------------------------------------------------------------------------------- the way


def test_by_path_without_an_installation_no_package_is_shadowed(place):
    """megalens/ stands first on sys.path then, with folders called data and ops and modules called track and config in it."""
    done = run(place, [*TRAIN, "config=conf/tiny.yaml", "run_name=by-path", "max_train_steps=2s"], installed=False)
    assert "finished: outputs/by-path/last at micro-step 2" in done.stderr
    assert "training outputs/by-path from fresh on 1 x cpu" in done.stderr
    assert re.search(r"fve +-?\d+\.\d\d +\.\.\..* -> ", done.stderr), "sample explanations are shown at the end"


def test_bare_deepspeed_command_trains_the_small_default_experiment_on_a_fresh_clone(tmp_path):
    for name in ("megalens", "conf", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    typed = ["deepspeed", "megalens/train.py", "--deepspeed", "ds_configs/z3.json"]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "installed": False}
    done = run(tmp_path, [*typed[:1], "--master_port", str(free_port()), *typed[1:]], **path)
    assert "training conf/tiny.yaml (the demo's activations are not there; make demo makes them)" in done.stderr
    assert "finished: outputs/default_tiny/last at micro-step 20" in done.stderr
    assert [line["step"] for line in curve(tmp_path, "default_tiny") if "train/loss" in line] == list(range(1, 21))


def test_arguments_that_name_an_experiment_stay_as_they_are():
    for named in (["config=conf/demo.yaml"], ["learning_rate=1e-3"], ["--deepspeed", "ds_configs/z3.json", "--run_name=x"]):
        assert with_experiment(named) == named


def test_help_needs_neither_torch_nor_a_configuration():
    done = run(ROOT, [sys.executable, "-X", "importtime", "megalens/train.py", "--help"], installed=False)
    assert "torchrun --nproc_per_node 2 megalens/train.py" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "deepspeed", "transformers", "wandb"}


@pytest.fixture(scope="module")
def alone(place):
    train(place, "config=conf/tiny.yaml", "run_name=alone", *ALL_TERMS, *TEN_STEPS)
    return curve(place, "alone")


def assert_same_losses(mine, theirs):
    assert [line.keys() for line in mine] == [line.keys() for line in theirs]
    losses = {"train/loss", "train/mse", "train/kl", "train/lm", "train/tail_say", "train/tail_read", "val/loss"}
    losses |= {"train/imitate", "train/rollout_read"}
    for one, other in zip(mine, theirs, strict=True):
        for name in losses & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
    assert sum("train/loss" in line for line in mine) == 10, "ten optimizer steps"


def test_torchrun_on_two_ranks_computes_the_same_run(place, alone):
    run(place, [*TORCHRUN, "2", "megalens/train.py", "config=conf/tiny.yaml", "run_name=torchrun", *ALL_TERMS, *TEN_STEPS])
    assert_same_losses(curve(place, "torchrun"), alone)


def test_two_ranks_with_slices_of_the_blocks_compute_the_same_run(place, alone):
    slices = ["engine=fsdp", "fsdp.tensor_ranks=2"]
    run_ranks(place, 2, [*TRAIN, "config=conf/tiny.yaml", "run_name=slices", *slices, *ALL_TERMS, *TEN_STEPS])
    assert_same_losses(curve(place, "slices"), alone)


@pytest.mark.parametrize(
    ("batch_size", "ranks", "tensor_ranks", "message"),
    [
        (6, 4, 1, "batch_size=6 cannot be shared by 4 processes"),
        (6, 4, 2, "batch_size=6 gives 3 samples to each of 2 groups of 2 processes"),
        (6, 3, 2, "fsdp.tensor_ranks=2 does not divide the 3 processes"),
        (8, 3, 3, None),
    ],
)
def test_batch_is_shared_by_groups_of_ranks(place, monkeypatch, batch_size, ranks, tensor_ranks, message):
    monkeypatch.chdir(place)
    for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    settings = ["config=conf/tiny.yaml", "engine=fsdp", f"fsdp.tensor_ranks={tensor_ranks}", f"batch_size={batch_size}", "kl_base_weight=1"]
    with pytest.raises(EngineError, match=message) if message else contextlib.nullcontext():
        check_ready(load_config(settings))


def test_killed_under_zero_3_and_under_fsdp_it_ends_on_three_ranks_as_the_same_run(place):
    """DeepSpeed, FSDP2, averaged gradients on 2, 1 and 3 ranks: no sample is dropped or repeated, or the losses would not agree."""
    found = change_engines(place, "adamw")
    assert found["train/loss"] < 1e-4
    assert found["val/loss"] < 1e-4
    assert found["weights"] < 1e-4


def test_zero_engine_in_one_process_needs_no_launcher(place, alone):
    arguments = ["config=conf/tiny.yaml", "deepspeed=ds_configs/z2.json", "run_name=zero-alone", *ALL_TERMS, *TEN_STEPS]
    train(place, *arguments)
    assert_same_losses(curve(place, "zero-alone"), alone)


@pytest.mark.parametrize("attempt", range(2))
def test_killed_at_a_random_moment_and_called_again_it_is_bitwise_the_same(place, alone, attempt):
    arguments = ["config=conf/tiny.yaml", f"run_name=killed-{attempt}", *ALL_TERMS, *TEN_STEPS]
    killed_at(place, [*TRAIN, *arguments], f"killed-{attempt}", step=random.Random(attempt).randrange(0, 9))
    train(place, *arguments)
    assert curve(place, f"killed-{attempt}") == alone
    mine, theirs = (load_file(place / "outputs" / name / "last" / "lens.safetensors") for name in (f"killed-{attempt}", "alone"))
    assert all(bool((mine[name] == theirs[name]).all()) for name in theirs)
    names = {path.name for path in (place / "outputs" / f"killed-{attempt}" / "checkpoints").iterdir()}
    assert names == {path.name for path in (place / "outputs" / "alone" / "checkpoints").iterdir()}


def test_signal_ends_it_with_its_own_code_and_the_same_command_goes_on(place, here):
    arguments = ["config=conf/tiny.yaml", "run_name=signal", "max_train_steps=500s", "checkpoint.save_interval=500s"]
    assert killed_at(place, [*TRAIN, *arguments], "signal", 3, signal.SIGTERM) == 128 + signal.SIGTERM
    step = json.loads((place / "outputs" / "signal" / "last" / "trainer.json").read_text())["progress"]["step"]
    assert 3 <= step < 500
    assert f"from step-{step:08d}" in here(*arguments[:2], f"max_train_steps={step + 1}s")


def test_lens_to_start_from_that_is_not_trained_yet_names_the_command(here):
    line = here("config=conf/tiny_from_warmstart.yaml", "init_from=conf/tiny_from_warmstart.yaml", "run_name=none")
    assert "train it first: python megalens/train.py config=conf/tiny_from_warmstart.yaml" in line


def test_a_run_starts_from_another_runs_lens(here):
    here("config=conf/tiny_warmstart.yaml", "max_train_steps=4s")
    printed = here("config=conf/tiny.yaml", "run_name=warm", "init_from=conf/tiny_warmstart.yaml", "max_train_steps=2s")
    assert "training outputs/warm from outputs/tiny_warmstart/best" in printed


def test_starting_anew_removes_the_earlier_checkpoints_and_says_so(place, here):
    here("config=conf/tiny.yaml", "run_name=anew", "max_train_steps=4s")
    printed = here("config=conf/tiny.yaml", "run_name=anew", "max_train_steps=2s", "checkpoint.resume=false")
    assert "the earlier checkpoints of outputs/anew are removed" in printed
    assert {line["step"] for line in curve(place, "anew")} == {0, 1, 2}


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_second_training_of_the_same_run_is_refused_while_the_first_is_at_work(here, monkeypatch):
    monkeypatch.setattr("megalens.training.start._PATIENCE", 0.3)
    arguments = ["config=conf/tiny.yaml", "run_name=twice", "max_train_steps=1s"]
    with sole_training(load_config(arguments)):
        line = here(*arguments)
        assert f"outputs/twice is being trained by process {os.getpid()} on " in line
        assert "choose another run_name" in line
        with monkeypatch.context() as other_rank:
            other_rank.setenv("RANK", "1")
            with sole_training(load_config(arguments)):
                pass
    assert "finished: outputs/twice" in here(*arguments)


def test_error_of_the_command_is_one_line_and_exit_code_1(place):
    assert "did you mean 'learning_rate'?" in refused(place, "config=conf/tiny.yaml", "learning_rat=1")


def test_what_it_refuses_each_in_one_line(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny = "config=conf/tiny.yaml"
    assert "did you mean 'learning_rate'?" in here(tiny, "learning_rat=1")
    assert "learning_rate= is empty" in here(tiny, "learning_rate=")
    assert "tools/dump_acts.py" in here(tiny, "layer_l=1")
    assert "layer" in here(tiny, "layer_l=9")
    assert "no/model" in here(tiny, "model_name=./no/model")
    assert "device=cuda, but PyTorch sees no GPU" in here(tiny, "device=cuda")
    assert "min_pos" in here(tiny, "activation_dumper.min_pos=5")
    assert "ds_configs/z3.json" in here(tiny, "--deepspeed", "ds_configs/z9.json")
    assert "init_from=nowhere is no checkpoint" in here(tiny, "init_from=nowhere", "run_name=init")
    assert "less than one optimizer step" in here(tiny, "max_train_steps=1s", "gradient_accumulation_steps=4", "run_name=short")
    assert "lower batch_size" in here(tiny, "batch_size=100000", "run_name=large")


def test_batch_that_the_ranks_cannot_share_is_refused_once(place):
    assert "batch_size=7 cannot be shared by 2 processes" in refused(place, "config=conf/tiny.yaml", "batch_size=7", ranks=2)
    odd = refused(place, "config=conf/tiny.yaml", "batch_size=6", "kl_base_weight=1", ranks=2)
    assert "kl_base_weight needs an even number" in odd


def test_resume_under_settings_that_change_the_lens_names_the_keys(place, here):
    arguments = ["config=conf/tiny.yaml", "run_name=changed", "max_train_steps=2s"]
    here(*arguments)
    line = here(*arguments, "lora.r=8", "t_text=5")
    assert "lora.r=4 (now 8)" in line
    assert "t_text=4 (now 5)" in line
    assert "checkpoint.resume=false" in line
    assert "of another width" in here("config=conf/tiny.yaml", "run_name=other-width", f"init_from={narrow_checkpoint(place)}")


def narrow_checkpoint(place):
    """A checkpoint that says it is of the same subject and is not."""
    from safetensors.torch import save_file

    folder = place / "narrow"
    subprocess.run(["cp", "-rL", str(place / "outputs" / "changed" / "last"), str(folder)], check=True)
    (folder / "checksums.json").unlink()
    about = json.loads((folder / "lens.json").read_text())
    (folder / "lens.json").write_text(json.dumps(about | {"width": 32}))
    for name in ("lens", "stats"):
        tensors = load_file(folder / f"{name}.safetensors")
        save_file({key: value[..., :32].contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return folder


def test_damaged_shard_is_refused_by_name(place, here, tmp_path):
    source = place / "data" / "activations"
    subprocess.run(["cp", "-rL", str(source), str(tmp_path / "activations")], check=True)
    shard = next((tmp_path / "activations").rglob("*_train/shard-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    line = here("config=conf/tiny.yaml", f"activation_dumper.root={tmp_path / 'activations'}", "run_name=damaged")
    assert shard.name in line


def test_full_disk_is_one_line_and_leaves_the_last_checkpoint(place, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    try:
        line = refused(place, "config=conf/tiny.yaml", f"output_dir={disk}", "train_mode=full")
        assert "No space left on device" in line
        assert str(disk) in line
    finally:
        subprocess.run(["umount", str(disk)], check=True)
