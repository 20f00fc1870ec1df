"""Checks that need no model and no data: whatever is bound to fail is refused before anything is loaded."""

from __future__ import annotations

import torch

from megalens.checkpoint import finished_checkpoints
from megalens.config import Config, ConfigError
from megalens.data import dump
from megalens.data.shards import REDUMP
from megalens.device import resolve_device
from megalens.engine import ds_config
from megalens.engine.base import EngineError
from megalens.families.loading import check_model, load_tokenizer
from megalens.launcher import launched
from megalens.lens.prompts import check_fits
from megalens.training.start import source_folder


def check_ready(config: Config) -> torch.device:
    """Refuse a training that cannot run; return the device it runs on.

    Raises:
        ValueError: a subclass of it; the message is one line and names the mend.
    """
    device = resolve_device(config.device)
    ranks = launched().size
    together = config.fsdp.tensor_ranks
    if ranks % together:
        raise EngineError(f"fsdp.tensor_ranks={together} does not divide the {ranks} processes")
    shares, who = ranks // together, "processes" if together == 1 else f"groups of {together} processes"
    if config.batch_size % shares:
        raise EngineError(f"batch_size={config.batch_size} cannot be shared by {shares} {who}; make it a multiple of {shares}")
    if config.kl_base_weight and config.batch_size // shares % 2:
        share = f"{config.batch_size // shares} samples to each of {shares} {who}"
        raise EngineError(f"batch_size={config.batch_size} gives {share}; kl_base_weight needs an even number")
    if config.deepspeed is not None:
        ds_config.resolve(config, ranks)
    if config.init_from is not None and not _has_checkpoint(config):
        source_folder(config)
    check_fits(config, check_model(config), load_tokenizer(config))
    for split in ("train", "val"):
        wrong = dump.check(config, split)
        if wrong is not None:
            mend = "" if "dump_acts" in wrong else f"; {REDUMP}"
            raise ConfigError(f"{wrong}{mend}")
    return device


def _has_checkpoint(config: Config) -> bool:
    return config.checkpoint.resume and bool(finished_checkpoints(config.run_dir / "checkpoints"))
