"""A module that is only used, never trained, in shards over the ranks: what reads, measures and explains with it holds its share alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from megalens.config import Config
from megalens.engine.base import device_of, fill
from megalens.engine.ranks import Ranks, join_alone, join_ranks


def shard_frozen(config: Config, module: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Ranks:
    """Shard a module by the engine of ``config``, which must be one that shards weights; nothing of it is trainable afterwards.

    The ranks must call its parts equally often, in one order, on whatever shapes (those that slice layers among them: on the same values).

    Args:
        module: what engines take (:func:`megalens.engine.build_engine`), with parameters on the meta device.
        weights: values of some parameters by name; they may be read as they are asked for.

    Returns:
        The ranks that share it. To be closed when the module is not used any more.

    Raises:
        EngineError: the ranks cannot share it as the engine's settings say.
        ConfigError: a weight cannot be read, or the module cannot be sliced for ``fsdp.tensor_ranks``.
    """
    device = device_of(module)
    join_ranks(device)
    join_alone(device)
    module.requires_grad_(False)
    if config.engine == "fsdp":
        from megalens.engine.fsdp import shard

        ranks = Ranks(device, config)
        shard(ranks, config, module, None, lambda unit, _: fill(module, unit, weights or {}, device))
        return ranks
    return _Zero(config, module, weights or {})


class _Zero(Ranks):
    """A module under DeepSpeed's ZeRO-3, without an optimizer."""

    def __init__(self, config: Config, module: Any, weights: Mapping[str, Tensor]):
        from megalens.engine.ds_config import resolve_frozen
        from megalens.engine.ds_package import import_deepspeed

        super().__init__(device_of(module), config)
        deepspeed, settings = import_deepspeed(self.device.type == "cuda"), resolve_frozen(config)
        deepspeed.init_distributed(dist_init_required=False)  # its Init asks for the number of ranks before it joins them
        for unit in module.shard_units():
            fill(module, unit, weights, self.device)
            deepspeed.zero.Init(nn.ModuleList(unit), config_dict_or_path=settings)
        self._engine, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)

    def close(self) -> None:
        """Let DeepSpeed go, when no rank gathers any more."""
        self.barrier()
        self._engine.destroy()
