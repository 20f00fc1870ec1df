"""One configuration for each method in conf/recipes/: each loads, says what it is, and trains the tiny model."""

import json
import math

import pytest
from conftest import ROOT

from megalens.config import load_config
from megalens.train import train
from megalens.training.track import read_curve

RECIPES = {  # by file: what must fall over the training, in the curve
    "tails": "train/tail_say",
    "given": "train/say",
    "gumbel": "train/mse",
    "grpo": "train/rollout_read",
    "leave_one_out": "train/rollout_read",
    "imitate": "train/imitate",
}
TINY = ["model_name=data/models/tiny-llama", "layer_l=2", "dtype=fp32", "dataset.name=data/corpus/tiny.jsonl", "pretokenize.num_proc=1"]
TINY += [
    "activation_dumper.seq_len=32",
    "activation_dumper.vectors_per_sequence=2",
    "t_text=4",
    "lora.r=4",
    "batch_size=8",
    "rollouts.draws=2",
]
TINY += ["max_train_steps=12s", "lr_scheduler.type=constant", "lr_scheduler.warmup_steps=0s", "learning_rate=0.01", "log_interval=4s"]
TINY += ["validation.num_samples=8", "validation.interval=12s", "checkpoint.save_interval=12s", "wandb.mode=disabled", "device=cpu"]


def test_every_recipe_is_here_and_says_in_its_head_what_it_is():
    files = sorted((ROOT / "conf" / "recipes").glob("*.yaml"))
    assert {file.stem for file in files} == set(RECIPES)
    for file in files:
        head = file.read_text(encoding="utf-8").split("\n")[:2]
        assert all(line.startswith("# ") for line in head), file
        start = load_config([f"config={file}"]).init_from
        assert start is None or (ROOT / start).is_file()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_dump):
    """A folder with the tiny dump, and a text for each of its first rows."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "data").symlink_to(tiny_dump)
    (folder / "conf").symlink_to(ROOT / "conf")
    words = [" ".join(str((row * step) % 7) for step in (1, 2)) for row in range(64)]
    lines = [json.dumps({"sample_id": row, "text": text}) for row, text in enumerate(words)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_the_tiny_model_and_its_own_figure_falls(place, monkeypatch, recipe):
    monkeypatch.chdir(place)
    settings = [f"config=conf/recipes/{recipe}.yaml", *TINY]
    if load_config(settings).init_from is not None:
        settings.append("init_from=outputs/tails/last")
    if recipe == "given":
        settings += ["given.path=texts.jsonl", "pretokenize.root=made"]
    config = load_config(settings)
    assert train(config) == 0
    lines = [line for line in read_curve(config.run_dir / "metrics.jsonl") if "train/loss" in line]
    assert len(lines) == 3
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    assert all(line["train/skipped"] == 0 for line in lines)
    assert lines[-1][RECIPES[recipe]] < lines[0][RECIPES[recipe]]
