"""Where a training's rows come from: read as it goes, or from several dumps, it is the same training."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from megalens.config import ConfigError, load_config
from megalens.data import DataError
from megalens.data.dump import dump
from megalens.data.loader import ActivationLoader
from megalens.data.pretokenize import pretokenize
from megalens.data.source import ContextReader, training_loader
from megalens.engine.local import LocalEngine
from megalens.lens.subject import Subject
from megalens.train import main
from megalens.training.track import read_curve

SMALL = ["activation_dumper.rows_per_shard=100", "activation_dumper.rows_per_batch=16", "device=cpu"]
TINY = ["config=conf/tiny.yaml", *SMALL, "max_train_steps=6s", "validation.interval=6s", "checkpoint.save_interval=3s"]


@pytest.fixture
def place(checkout):
    """A folder in which the tiny corpus is tokenized."""
    pretokenize(load_config(TINY))
    return checkout


def losses(run: str) -> list[float]:
    return [line["train/loss"] for line in read_curve(Path(f"outputs/{run}/metrics.jsonl")) if "train/loss" in line]


def test_contexts_come_in_the_dumps_order_without_a_dump(place):
    config = load_config(TINY)
    reader = ContextReader(config, "train")
    for window in [1, 20_000, 1 << 28]:
        alone = list(islice(ActivationLoader(reader, 8, 3, window_bytes=window).batches(2), 60))
        if window == 1:
            dump(config)
        dumped = ActivationLoader(config.activation_dir("train"), 8, 3, window_bytes=window)
        for ours, theirs in zip(alone, dumped.batches(2), strict=False):
            assert "activation" not in ours
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(ActivationLoader(reader, 8, 3).documents(), dumped.documents())
    with pytest.raises(DataError, match=r"another layer .2 there, 1 now"):
        reader.check_matches({"layer": 1})
    part = dumped.rows(range(100))["activation"]
    for ours, theirs in [(reader.statistics.mean, part.mean(0)), (reader.statistics.var, part.var(0, correction=0))]:
        torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0.01)


def test_a_reader_of_contexts_can_be_sent_to_worker_processes(place):
    reader = ContextReader(load_config(TINY), "train")
    last = len(reader.batch_rows) - 1
    before = reader.read_batch(last)
    sent = pickle.loads(pickle.dumps(reader))  # noqa: S301 - what spawn and forkserver do
    assert all(torch.equal(sent.read_batch(last)[name], before[name]) for name in before)


@pytest.mark.parametrize(("encoding", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_training_on_the_fly_is_training_on_the_dump(place, encoding, tolerance):
    settings = [*TINY, f"activation_dumper.encoding={encoding}", "activation_dumper.rows_per_shard=1000", "kl_base_weight=0.5"]
    settings = [s for s in settings if s not in SMALL[:1]]
    dump(load_config([*settings, "on_the_fly=true"]))
    assert not load_config(settings).activation_dir("train").exists()
    assert main([*settings, "on_the_fly=true", "run_name=fly"]) == 0
    dump(load_config(settings))
    assert main([*settings, "run_name=dumped"]) == 0
    assert len(losses("fly")) == 6
    assert losses("fly") == pytest.approx(losses("dumped"), rel=tolerance)


@pytest.mark.parametrize(("weight", "reads", "lower"), [(0.5, 1, 0), (0, 0, 1)])
def test_reading_on_the_fly_is_the_kl_terms_own_read(place, monkeypatch, weight, reads, lower):
    settings = [*TINY, "on_the_fly=true", f"kl_base_weight={weight}", "max_train_steps=3s"]
    dump(load_config(settings))
    calls, in_step, step = Counter(), [], LocalEngine.train_step

    def noted_step(self, *arguments):
        in_step.append(True)
        metrics = step(self, *arguments)
        in_step.clear()
        return metrics

    monkeypatch.setattr(LocalEngine, "train_step", noted_step)
    for name in ("read", "residual"):
        plain = getattr(Subject, name)

        def counted(self, *inputs, name=name, plain=plain):
            calls[name] += len(in_step)
            return plain(self, *inputs)

        monkeypatch.setattr(Subject, name, counted)
    assert main(settings) == 0
    assert (calls["read"], calls["residual"]) == (3 * reads, 3 * lower)


def test_a_mixture_is_trained_on_and_goes_on(place):
    settings = [*TINY, "dataset.split_seed=1", "activation_dumper.root=other"]
    pretokenize(load_config([*settings, "pretokenize.root=other"]))
    dump(load_config([*settings, "pretokenize.root=other"]))
    dump(load_config(TINY))
    folders = [load_config(s).activation_dir("train") for s in (TINY, settings)]
    steady = "gumbel_tau_schedule.type=constant"
    mix = f"mix=[{folders[0]}=0.7,{folders[1]}=0.3]"
    assert main([*TINY, mix, steady, "run_name=whole", "loader_workers=1"]) == 0
    assert main([*TINY, mix, steady, "run_name=parts", "max_train_steps=3s"]) == 0
    assert main([*TINY, mix, steady, "run_name=parts"]) == 0
    assert losses("parts") == losses("whole")
    with pytest.raises(ValueError, match="was begun with dump="):
        main([*TINY, f"mix=[{folders[0]}=0.6,{folders[1]}=0.4]", "run_name=parts"])


def test_what_cannot_be_mixed_is_named(place):
    dump(load_config(TINY))
    folder = load_config(TINY).activation_dir("train")
    with pytest.raises(ConfigError, match="no FOLDER=SHARE"):
        training_loader(load_config([*TINY, f"mix=[{folder}]"]))
    with pytest.raises(DataError, match="is of another layer"):
        training_loader(load_config([*TINY, f"mix=[{folder}=1]", "layer_l=1"]))
