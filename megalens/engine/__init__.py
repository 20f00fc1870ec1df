"""Engines: what moves the weights, on one process or many; and what shards weights that stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalens.config import Config
from megalens.engine.base import Engine, EngineError, Groups
from megalens.engine.frozen import shard_frozen
from megalens.engine.ranks import Ranks, data_share, join_ranks, leave_ranks, rank_and_size

__all__ = [
    "Engine",
    "EngineError",
    "Ranks",
    "build_engine",
    "data_share",
    "join_ranks",
    "leave_ranks",
    "rank_and_size",
    "shard_frozen",
    "shards_weights",
    "sharers",
]


def shards_weights(config: Config) -> bool:
    """Does the engine of ``config`` cut the weights themselves into shards (and give those on the meta device their values)?"""
    if config.deepspeed is None:
        return config.engine == "fsdp"
    from megalens.engine.ds_config import zero_stage

    return zero_stage(config) == 3


def sharers(config: Config, device: torch.device) -> Ranks:
    """The ranks that share one copy of the weights under the engine of ``config``, joined; this process alone where each has its own."""
    if not shards_weights(config):
        return Ranks(device)
    join_ranks(device)
    return Ranks(device, config)


def build_engine(config: Config, module: nn.Module, groups: Groups, weights: dict[str, Tensor] | None = None) -> Engine:
    """The engine that ``config`` asks for: FSDP2, DeepSpeed's ZeRO 1-3, or the local one (also for ZeRO 0, which shards nothing).

    Args:
        module: called as ``module(batch, at)``. An engine that :func:`shards_weights` takes it with parameters on the meta device, gives
            them their values (``weights``, else ``module.initial(name)``) and shards them, one of its ``shard_units()`` at a time.
        groups: its trainable parameters by group and name.
        weights: float32 values of trainable parameters, where they are known more exactly than the module holds them.
    """
    if config.engine == "fsdp":
        from megalens.engine.fsdp import FsdpEngine

        return FsdpEngine(config, module, groups, weights)
    if config.deepspeed is not None:
        from megalens.engine.ds_config import zero_stage

        if zero_stage(config) > 0:
            from megalens.engine.zero import ZeroEngine

            return ZeroEngine(config, module, groups, weights)
    from megalens.engine.local import LocalEngine

    return LocalEngine(config, module, groups, weights)
