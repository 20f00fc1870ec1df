"""A training of seconds for the tests: a tiny random Llama and made-up activations of it."""

from __future__ import annotations

import torch

from megalens.config import Checkpoint, Config, Dataset, Lora, Schedule, Validation, Wandb
from megalens.data.shards import ShardWriter
from megalens.tiny import make_model

ROWS = {"train": 40, "val": 18}


def tiny_config(folder, run_name="run", **keys) -> Config:
    """Eight optimizer steps of two micro-steps, validated and saved every four micro-steps; ``folder`` holds everything."""
    keys = {
        "train_mode": "lora",
        "dtype": "fp32",
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_train_steps": "16s",
        "learning_rate": 0.01,
        "tail_say_weight": 1.0,
        "tail_read_weight": 1.0,
        "validation": Validation(interval="4s", num_samples=16, num_examples=2),
        "checkpoint": Checkpoint(save_interval="4s"),
        "wandb": Wandb(mode="disabled"),
        "gumbel_tau_schedule": Schedule(type="linear", start_value=1.0, end_value=0.5),
        **keys,
    }
    config = Config(
        model_name=str(folder / "model"),
        layer_l=1,
        t_text=3,
        device="cpu",
        run_name=run_name,
        output_dir=str(folder / "outputs"),
        dataset=Dataset(name="made-up"),
        log_interval="2s",
        lora=Lora(r=2, alpha=2.0, dropout=0.1),
        **keys,
    )
    config.activation_dumper.root = str(folder / "activations")
    return config


def make_subject_and_dump(folder, shift: float = 1.0) -> None:
    """The model and both splits' dumps, of mean ``shift``, where ``tiny_config(folder)`` expects them."""
    make_model(folder / "model")
    config = tiny_config(folder)
    for number, (split, rows) in enumerate(ROWS.items()):
        draw = torch.Generator().manual_seed(number)
        header = {
            "d": 64,
            "layer": 1,
            "encoding": "bf16_planes",
            "token_type": "uint16",
            "seq_len": 12,
            "rows": rows,
            "rows_per_shard": 32,
            "rows_per_batch": 8,
        }
        writer = ShardWriter(config.activation_dir(split), header)
        writer.begin()
        for shard in range(writer.num_shards):
            count = len(writer.shard_rows(shard))
            position = torch.randint(6, 12, (count,), generator=draw)
            writer.write(
                shard,
                {
                    "activation": torch.randn(count, 64, generator=draw) + shift,
                    "input_ids": torch.randint(3, 500, (count, 12), generator=draw),
                    "position": position,
                    "doc_id": torch.arange(count),
                },
            )
        writer.finish()
