"""A lens on the tiny model, saved as a training saves it but never trained; for the tests of what uses a finished lens."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megalens.checkpoint.formats.megalens import save_lens
from megalens.config import config_from_dict
from megalens.data.dump import dump
from megalens.data.pretokenize import pretokenize
from megalens.data.shards import ShardReader
from megalens.engine.state import Part
from megalens.lens.names import stable_names
from megalens.objective import build_lens
from megalens.tiny import make_model, make_text

SETTINGS = {
    "layer_l": 1,
    "t_text": 3,
    "dtype": "fp32",
    "device": "cpu",
    "run_name": "tiny",
    "train_mode": "lora",
    "lora": {"r": 2},
    "activation_dumper": {"seq_len": 24, "vectors_per_sequence": 2, "min_pos": 4},
    "evaluation": {"batch_size": 8, "bootstrap": 40, "examples": 3, "report_documents": 2},
    "pretokenize": {"num_proc": 1},
}


def make_run(folder: Path, kind: str = "llama", model: Path | None = None, **settings) -> Path:
    """Model, corpus, dumps and ``outputs/tiny/best`` under ``folder``; returns the last.

    ``model`` is one that is there already; ``settings`` are other than :data:`SETTINGS`.
    """
    model, text = model or make_model(folder / "model", kind=kind), make_text(folder / "text.jsonl", documents=40)
    roots = {
        "dataset": {"name": str(text), "val_fraction": 0.5},
        "activation_dumper": SETTINGS["activation_dumper"] | {"root": str(folder / "activations")},
        "pretokenize": SETTINGS["pretokenize"] | {"root": str(folder / "pretokenized")},
    }
    config = config_from_dict(SETTINGS | settings | roots | {"model_name": str(model), "output_dir": str(folder / "outputs")})
    pretokenize(config)
    dump(config)
    statistics = ShardReader(config.activation_dir("train")).statistics
    lens = build_lens(config, statistics.mean, statistics.var)
    draw, state = torch.Generator().manual_seed(1), lens.state_dict()
    names = stable_names(lens.lens_state_names())
    weights = {stable: state[name] + 0.05 * torch.randn(state[name].shape, generator=draw) for name, stable in names.items()}
    checkpoint = config.run_dir / "checkpoints" / "step-00000012"
    checkpoint.mkdir(parents=True)
    save_lens(checkpoint, config, Part(weights), statistics, (statistics.mean, statistics.var), lens.subject.fingerprint)
    (checkpoint / "trainer.json").write_text(json.dumps({"progress": {"step": 12}}))
    curve = [{"step": step, "train/loss": 3.0 - step / 10, "val/fve_nrm": step / 20} for step in range(12)]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    best = config.run_dir / "best"
    best.symlink_to("checkpoints/step-00000012")
    return best
