"""The training loop on a tiny model: its curve, its checkpoints, and that an interruption changes nothing."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import threading

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_subject_and_dump, tiny_config

import megalens.training.trainer
from megalens.checkpoint import CheckpointError
from megalens.checkpoint.formats import load_lens
from megalens.checkpoint.run_folder import RunFolder
from megalens.config import Checkpoint, EarlyTermination, Validation
from megalens.data.loader import ActivationLoader
from megalens.data.shards import ShardReader
from megalens.engine.local import LocalEngine
from megalens.evaluate.evaluation import evaluate
from megalens.evaluate.metrics import FIGURES
from megalens.explain.search import Greedy
from megalens.families.loading import load_tokenizer
from megalens.lens.lens import ConsistencyLens
from megalens.schedule import Clock
from megalens.train import train
from megalens.training.progress import TrainingError, clock_of
from megalens.training.track import read_curve


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    make_subject_and_dump(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    config = tiny_config(folder, "undisturbed")
    assert train(config) == 0
    return config


def curve(config):
    lines = read_curve(config.run_dir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def weights(config, which="last"):
    return load_file(config.run_dir / which / "lens.safetensors")


def kill_at(monkeypatch, update):
    step = LocalEngine.train_step

    def killed(self, batches, at, rollouts=None):
        if at.update == update:
            raise Killed
        return step(self, batches, at, rollouts)

    monkeypatch.setattr(LocalEngine, "train_step", killed)


def assert_same_run(one, other):
    assert curve(one) == curve(other)
    for which in ("last", "best"):
        mine, theirs = weights(one, which), weights(other, which)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_curve_starts_at_zero_ends_at_the_end_and_names_its_figures(undisturbed):
    lines = curve(undisturbed)
    assert [line["step"] for line in lines if "val/fve_nrm" in line] == [0, 4, 8, 12, 16]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert {"train/mse", "train/tail_say", "train/grad_norm", "train/learning_rate", "train/tau", "train/skipped"} <= lines[1].keys()
    assert {"val/loss", "val/mse", "val/fve", "val/fve_std", "val/cos", "val/kl_recovered"} <= lines[0].keys()
    assert lines[1]["train/tau"] == 1.0
    assert lines[-2]["train/tau"] == pytest.approx(1 - 0.5 * 14 / 16)
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_training_lowers_the_loss(undisturbed):
    losses = [line["train/loss"] for line in curve(undisturbed) if "train/loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_last_and_best_are_links_to_whole_checkpoints_and_nothing_else_is_kept(undisturbed):
    run = undisturbed.run_dir
    state = json.loads((run / "last" / "trainer.json").read_text())
    values = {line["step"]: line["val/fve_nrm"] for line in curve(undisturbed) if "val/fve_nrm" in line}
    best = max(values, key=values.get)
    assert os.readlink(run / "last") == "checkpoints/step-00000016"
    assert os.readlink(run / "best") == f"checkpoints/step-{best:08d}"
    assert state["progress"]["best"] == [[values[best], f"step-{best:08d}"]]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000016", f"step-{best:08d}"}
    held = {path.name for path in (run / "last").iterdir()}
    assert held == {"lens.safetensors", "lens.json", "stats.safetensors", "trainer.json", "engine", "checksums.json"}


def test_finished_run_says_so_and_changes_nothing(undisturbed, capsys):
    before = (undisturbed.run_dir / "metrics.jsonl").read_bytes()
    assert train(undisturbed) == 0
    assert "is finished: 16 micro-steps; max_train_steps trains it longer" in capsys.readouterr().err
    assert train(dataclasses.replace(undisturbed, max_train_steps="8s")) == 0
    assert "is finished: 16 micro-steps, and max_train_steps asks for 8; max_train_steps trains" in capsys.readouterr().err
    assert (undisturbed.run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("updates", [(0,), (5,), (3, 7)], ids=str)
def test_killed_and_resumed_run_is_the_undisturbed_one_bitwise(folder, undisturbed, monkeypatch, updates):
    config = tiny_config(folder, f"killed-{'-'.join(map(str, updates))}")
    for update in updates:
        with monkeypatch.context() as patch:
            kill_at(patch, update)
            with pytest.raises(Killed):
                train(config)
    assert train(config) == 0
    assert_same_run(config, undisturbed)


def test_bf16_resume_is_bitwise_too(folder, monkeypatch):
    configs = [tiny_config(folder, name, dtype="bf16", train_mode="full", max_train_steps="8s") for name in ("bf16", "bf16-killed")]
    assert train(configs[0]) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train(configs[1])
    assert train(configs[1]) == 0
    assert_same_run(*configs)
    assert all(value.dtype == torch.float32 for value in weights(configs[0]).values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_behind_the_step_and_the_run_goes_on_as_if_undisturbed(folder, undisturbed, monkeypatch, number):
    config = tiny_config(folder, f"stopped-{number}")
    step = LocalEngine.train_step
    before = signal.getsignal(number)

    def signalled(self, batches, at, rollouts=None):
        if at.update == 2:
            os.kill(os.getpid(), number)
        return step(self, batches, at, rollouts)

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "train_step", signalled)
        assert train(config) == 128 + number
    assert json.loads((config.run_dir / "last" / "trainer.json").read_text())["progress"]["step"] == 6
    assert signal.getsignal(number) == before
    assert train(config) == 0
    assert_same_run(config, undisturbed)


def test_stopped_where_a_validation_was_due_it_is_made_up_for(folder, undisturbed, monkeypatch):
    config = tiny_config(folder, "stopped-at-validation")
    step = LocalEngine.train_step

    def signalled(self, batches, at, rollouts=None):
        if at.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches, at, rollouts)

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "train_step", signalled)
        assert train(config) == 128 + signal.SIGTERM
    assert [line["step"] for line in curve(config) if "val/loss" in line] == [0, 4]
    assert train(config) == 0
    assert_same_run(config, undisturbed)


def test_steps_that_are_not_finite_are_skipped_counted_and_warned_of(folder, monkeypatch, capsys):
    config = tiny_config(folder, "spoilt")
    forward = megalens.lens.lens.ConsistencyLens.forward

    def spoilt(self, batch, at):
        terms = forward(self, batch, at)
        return terms | {"loss": terms["loss"] * float("nan")} if at.update in (2, 3) and self.training else terms

    monkeypatch.setattr(megalens.lens.lens.ConsistencyLens, "forward", spoilt)
    assert train(config) == 0
    assert curve(config)[-1]["step"] == 16
    assert [line["train/skipped"] for line in curve(config) if "train/loss" in line][-1] == 2
    assert "warning: optimizer step 3 skipped: loss nan" in capsys.readouterr().err
    assert all(torch.isfinite(value).all() for value in weights(config).values())


def test_nothing_but_skipped_steps_ends_the_training(folder, monkeypatch):
    config = tiny_config(folder, "hopeless", learning_rate=0.01)
    monkeypatch.setattr(megalens.training.trainer, "SKIPS_IN_A_ROW", 3)
    forward = megalens.lens.lens.ConsistencyLens.forward

    def spoilt(self, batch, at):
        terms = forward(self, batch, at)
        return terms | {"loss": terms["loss"] * math.inf} if self.training else terms

    monkeypatch.setattr(megalens.lens.lens.ConsistencyLens, "forward", spoilt)
    with pytest.raises(TrainingError, match="3 optimizer steps in a row"):
        train(config)


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(folder, monkeypatch):
    config = tiny_config(folder, "ruined")
    step = LocalEngine.train_step

    def ruining(self, batches, at, rollouts=None):
        metrics = step(self, batches, at, rollouts)
        if at.update == 3:
            self.masters["reconstructor.head.linear.bias"].data[0] = math.nan
        return metrics

    monkeypatch.setattr(LocalEngine, "train_step", ruining)
    with pytest.raises(TrainingError, match=r"not finite at micro-step 8 \(reconstructor.head.bias\).*last checkpoint stays"):
        train(config)
    assert os.readlink(config.run_dir / "last") == "checkpoints/step-00000004"


def test_best_n_checkpoints_are_kept_in_order(folder):
    options = Checkpoint(save_interval="4s", track_best_n=3, best_metric="val/loss", best_mode="min")
    config = tiny_config(folder, "best-three", checkpoint=options)
    assert train(config) == 0
    values = {line["step"]: line["val/loss"] for line in curve(config) if "val/loss" in line}
    wanted = sorted(values, key=values.get)[:3]
    state = json.loads((config.run_dir / "last" / "trainer.json").read_text())
    assert [name for _, name in state["progress"]["best"]] == [f"step-{step:08d}" for step in wanted]
    assert {path.name for path in (config.run_dir / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in {*wanted, 16}}


def test_every_nth_checkpoint_is_saved_and_kept_for_good(folder):
    config = tiny_config(folder, "every-nth", checkpoint=Checkpoint(save_interval="16s", keep_every="6s"))
    assert train(config) == 0
    state = json.loads((config.run_dir / "last" / "trainer.json").read_text())
    assert state["progress"]["kept"] == [[6, "step-00000006"], [12, "step-00000012"]]
    best = (config.run_dir / "best").resolve().name
    names = {path.name for path in (config.run_dir / "checkpoints").iterdir()}
    assert names == {"step-00000006", "step-00000012", "step-00000016", best}
    assert load_file(config.run_dir / "checkpoints" / "step-00000006" / "lens.safetensors").keys() == weights(config).keys()


def test_training_goes_on_while_a_checkpoint_is_written(folder, undisturbed, monkeypatch):
    config = tiny_config(folder, "overlapped")
    finish, step, stepped, seen = RunFolder.finish, LocalEngine.train_step, threading.Event(), []

    def slow_finish(self, *arguments):
        seen.append(stepped.wait(30) or arguments[0] == "step-00000016")  # behind the last there is no step
        return finish(self, *arguments)

    def noted_step(self, batches, at, rollouts=None):
        metrics = step(self, batches, at, rollouts)
        if at.update:  # the first save is at the end of micro-step 0, before any step
            stepped.set()
        return metrics

    monkeypatch.setattr(RunFolder, "finish", slow_finish)
    monkeypatch.setattr(LocalEngine, "train_step", noted_step)
    assert train(config) == 0
    assert len(seen) >= 4
    assert all(seen), "a step was made before the save was over"
    assert_same_run(config, undisturbed)


def test_failed_save_ends_the_training_and_leaves_the_last_checkpoint(folder, monkeypatch):
    config, finish = tiny_config(folder, "no-space"), RunFolder.finish

    def full_disk(self, name, *arguments):
        if name == "step-00000008":
            raise OSError(errno.ENOSPC, "No space left on device", name)
        return finish(self, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train(config)
    assert (config.run_dir / "last").resolve().name == "step-00000004"
    assert not list((config.run_dir / "checkpoints").glob(".*"))


def test_damaged_checkpoint_is_refused_and_the_mend_it_names_works(folder, undisturbed):
    config = tiny_config(folder, "damaged", checkpoint=Checkpoint(save_interval="4s", keep_every="4s"), max_train_steps="8s")
    config.gumbel_tau_schedule.num_steps = "16s"
    assert train(config) == 0
    path = config.run_dir / "last" / "engine" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    config.max_train_steps = "16s"
    with pytest.raises(CheckpointError, match=r"step-00000008/engine/optimizer.safetensors does not match its checksum") as error:
        train(config)
    subprocess.run(re.search(r"`(.*)`", str(error.value))[1], shell=True, check=True)
    assert (config.run_dir / "last").resolve().name == "step-00000004"
    assert train(config) == 0
    assert_same_run(config, undisturbed)


def test_unknown_best_metric_names_those_there_are(folder):
    config = tiny_config(folder, "metric", checkpoint=Checkpoint(best_metric="val/fve_nmr"))
    with pytest.raises(TrainingError, match="val/fve_nmr is not measured; there are: .*val/fve_nrm"):
        train(config)


def test_longer_training_goes_on_from_the_finished_one(folder):
    config = tiny_config(folder, "longer", max_train_steps="4s")
    assert train(config) == 0
    config.max_train_steps = "6s"
    assert train(config) == 0
    assert [line["step"] for line in curve(config) if "val/loss" in line] == [0, 4, 6]


def last_validation(config):
    return {name[4:]: value for name, value in curve(config)[-1].items() if name.startswith("val/")}


def test_validation_measures_what_evaluation_measures(folder):
    config = tiny_config(folder, "one-definition", max_train_steps="4s", validation=Validation(num_samples=18))
    assert train(config) == 0
    loaded = load_lens(config.run_dir / "last")
    held_out = ActivationLoader(config.activation_dir("val"), 1, config.seed)
    measured = evaluate(loaded.lens, held_out, config, loaded.statistics, Greedy(), progress=False, with_documents=False)
    measured, validated = measured.figures["lens"], last_validation(config)
    names = [figure.name for figure in FIGURES if figure.name in measured]  # without those of texts that end
    assert {"fve_nrm", "kl_recovered", "top1"} <= set(names)
    for name in names:
        assert validated[name] == pytest.approx(measured[name], rel=1e-5, abs=1e-6), name


def test_validation_reads_explanations_from_their_string(folder, monkeypatch):
    """A lens whose tokens are no text scores as the mean activation, whatever its reconstructor makes of the tokens."""
    config = tiny_config(folder, "no-text", max_train_steps="2s")
    eos = load_tokenizer(config).eos_token_id
    monkeypatch.setattr(ConsistencyLens, "verbalize", lambda self, a_BD: torch.full((len(a_BD), 3), eos))
    assert train(config) == 0
    validated = last_validation(config)
    assert validated["failed"] == 1
    assert validated["fve"] == validated["fve_std"] == 0
    assert validated["kl_recovered"] == pytest.approx(0, abs=1e-6)


def test_a_lens_from_another_dump_is_measured_against_its_own(folder, tmp_path):
    config = tiny_config(folder, "first-dump", max_train_steps="2s")
    assert train(config) == 0
    make_subject_and_dump(tmp_path, shift=-3.0)
    other = tiny_config(tmp_path, "second-dump", max_train_steps="4s", init_from=str(config.run_dir / "last"))
    other.validation.num_samples = 18
    other.model_name = config.model_name
    assert train(other) == 0
    first, second = (ShardReader(c.activation_dir("train")).statistics for c in (config, other))
    assert not torch.allclose(first.mean, second.mean, atol=1)
    loaded = load_lens(other.run_dir / "last")
    kept, lens = loaded.statistics, loaded.lens
    assert torch.equal(kept.mean, second.mean), "what it is measured against"
    assert torch.equal(kept.mean_normalised, second.mean_normalised)
    assert torch.equal(lens.mean, first.mean), "what it was trained to standardise by"
    assert torch.equal(lens.reconstructor.head.mean, first.mean)
    held_out = ActivationLoader(other.activation_dir("val"), 1, other.seed)
    options = {"progress": False, "with_documents": False}
    against = [evaluate(lens, held_out, other, s, Greedy(), **options).figures["lens"]["fve"] for s in (first, second)]
    other.max_train_steps = "6s"
    assert train(other) == 0, "and when it goes on from its own checkpoint"
    validated = [line["val/fve"] for line in curve(other) if "val/fve" in line]
    assert abs(against[0] - against[1]) > 0.1
    assert validated[1] == pytest.approx(against[1], rel=1e-5)
    assert torch.equal(load_lens(other.run_dir / "last").lens.mean, first.mean)


def test_validation_of_more_rows_than_there_are_takes_all(folder):
    config = tiny_config(folder, "all-rows", max_train_steps="2s", validation=Validation(num_samples=1000))
    assert train(config) == 0
    assert curve(config)[-1]["step"] == 2


def test_clock_counts_whole_optimizer_steps():
    config = tiny_config_of(max_train_steps="2e", gradient_accumulation_steps=4)
    assert clock_of(config, 5) == Clock(steps_per_epoch=5, steps_per_update=4, total_steps=8)
    config.max_train_steps, config.num_train_epochs = None, 1.5
    assert clock_of(config, 8).total_steps == 12
    config.max_train_steps = "3s"
    with pytest.raises(TrainingError, match="max_train_steps=3s is less than one optimizer step"):
        clock_of(config, 8)


def test_early_termination_ends_it_there_and_a_later_end_goes_on_as_if_nothing_had_happened(folder, undisturbed):
    config = tiny_config(folder, "early", early_termination=EarlyTermination(steps="3os"))
    assert train(config) == 0
    assert read_curve(config.run_dir / "metrics.jsonl")[-1]["step"] == 6
    assert (config.run_dir / "last").resolve().name == "step-00000006"
    assert train(config) == 0, "nothing left to do"
    assert train(tiny_config(folder, "early")) == 0
    mine, theirs = weights(config), weights(undisturbed)
    assert all(bool((mine[name] == theirs[name]).all()) for name in theirs)


def test_early_end_is_rounded_up_to_whole_optimizer_steps_and_changes_no_schedule():
    config = tiny_config_of(max_train_steps="40s", gradient_accumulation_steps=4, early_termination=EarlyTermination(steps="5s"))
    assert clock_of(config, 5).last_step == 8
    assert clock_of(config, 5).total_steps == 40
    config.early_termination.steps = "9e"
    assert clock_of(config, 5).last_step == 40


def tiny_config_of(**keys):
    from megalens.config import Config

    return Config(**keys)
