"""DeepSpeed's ZeRO 1-3: optimizer state, gradients and parameters in shards over the ranks, or offloaded to the CPU.

DeepSpeed's own checkpoints are pickles, tied to the number of ranks; this engine gathers the optimizer's state by parameter name, one at a
time, and writes it as all engines do.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from megalens.config import Config
from megalens.engine.base import Batch, Engine, Groups, build_optimizer, device_of, fill, optimizer_groups, to_device, with_rollouts
from megalens.engine.ds_config import DeepSpeedFileError, resolve
from megalens.engine.ds_package import import_deepspeed, said_by
from megalens.engine.ranks import join_alone
from megalens.engine.state import OptimizerState, Part


class ZeroEngine(Engine):
    """A module under DeepSpeed, as ``config.deepspeed`` describes it.

    Args:
        weights: float32 values of trainable parameters, where they are known more exactly than the module holds them.

    Raises:
        EngineError: DeepSpeed refuses the file only now, with the model before it.
    """

    def __init__(self, config: Config, module: nn.Module, groups: Groups, weights: dict[str, Tensor] | None = None):
        on_gpu = device_of(module).type == "cuda"
        os.environ.setdefault("LOCAL_RANK", "0")
        join_alone(device_of(module))
        super().__init__(config, module, groups)
        weights = weights or {}
        deepspeed, settings, chosen = import_deepspeed(on_gpu), resolve(config, self.world_size), optimizer_groups(config, groups)
        if settings["zero_optimization"]["stage"] == 3:
            deepspeed.init_distributed(dist_init_required=False)  # its Init asks for the number of ranks before it joins them
            for unit in getattr(module, "shard_units", list)():
                fill(module, unit, weights, self.device)
                deepspeed.zero.Init(nn.ModuleList(unit), config_dict_or_path=settings)
        try:
            self.engine, self.sharded, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self._within_limit(build_optimizer(config, chosen, fused=True)),
                config=settings,
                dist_init_required=False,
            )
        except (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            raise DeepSpeedFileError(str(config.deepspeed), [f"{said_by(error)}; see ds_configs/z2.json for what works"]) from None
        self.device = self.engine.device
        self._share_float32_shards()
        for name, parameter in self.parameters.items():  # here, because DeepSpeed takes the norm of whatever gradient comes
            parameter.register_hook(lambda gradient, name=name: torch.zeros_like(gradient) if name in self.resting else gradient)
        for name in self.parameters.keys() & weights.keys():
            self._set(name, weights[name], None)

    def train_step(self, batches: Sequence[Batch], at: Any, rollouts: list[Any] | None = None) -> dict[str, float]:
        total: dict[str, float] = {}
        for batch, rollout in with_rollouts(batches, rollouts):
            terms = self.engine(to_device(batch, self.device), at, *rollout)
            loss = terms["loss"]
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + value.item() / len(batches)
            # DeepSpeed looks at gradients only; a loss that is not finite must spoil them, so that every rank skips.
            self.engine.backward(loss if math.isfinite(loss.item()) else loss * math.nan)
            self.engine.step()
        self._forget_gradients()
        norm, means = float(self.engine.get_global_grad_norm()), self.reduce_mean(total)
        sound = self.engine.was_step_applied() and self._is_sound(means["loss"], norm)
        return means | {"grad_norm": norm, "skipped": float(not sound)}

    @property
    def optimizer_groups(self) -> list[dict]:
        return self.sharded.param_groups

    def whole(self, name: str, moment: str | None = None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if name not in self.parameters:  # not trained
            parameter = self.module.get_parameter(name)
            with _gathered(parameter):
                return parameter.detach().clone()
        if moment is None:
            return safe_get_full_fp32_param(self.parameters[name])
        if not self.steps_taken(name):
            return torch.zeros(self.shapes[name])
        return safe_get_full_optimizer_state(self.parameters[name], moment)

    def optimizer_part(self) -> Part:
        self._link_moments()
        return super().optimizer_part()

    def steps_taken(self, name: str) -> float:
        state = self._optimizer.state.get(self._partitions()[self._partition_of[name]], {})
        return float(state.get("step", 0.0))

    def load_state(self, saved: OptimizerState) -> None:
        saved.expect(self.moments, {name: self.shapes[name] for name in self.parameters})
        if not self.moments:
            return
        partitions = self._partitions()
        for name, index in self._partition_of.items():  # those of one partition have taken the same steps
            zeros = {key: torch.zeros_like(partitions[index].data) for key in self.moments}
            self._optimizer.state[partitions[index]] = {"step": torch.tensor(saved.steps_taken(name)), **zeros}
        self._link_moments()
        for name in self.parameters:
            for key, value in saved.moments(name).items():
                self._set(name, value, key)

    def close(self) -> None:
        self.engine.destroy()

    # ------------------------------------------------------------------------------------- DeepSpeed's shards by name

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.sharded.optimizer

    @property
    def _is_stage_3(self) -> bool:
        return self.engine.zero_optimization_stage() == 3

    def _within_limit(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer, which leaves everything as it is when the gradient is beyond the limit: DeepSpeed knows none but infinity."""
        step = optimizer.step

        def step_if_sound(*arguments: Any, **options: Any) -> Any:
            norm = self.sharded._global_grad_norm if hasattr(self, "sharded") else 0.0  # DeepSpeed steps on zeros as it is built
            return step(*arguments, **options) if self._is_sound(0.0, float(norm)) else None

        optimizer.step = step_if_sound  # type: ignore[method-assign]
        return optimizer

    def _partitions(self) -> list[Tensor]:
        """This rank's flat float32 partitions, which the optimizer steps on."""
        for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self.sharded, attribute):
                return getattr(self.sharded, attribute)
        raise TypeError(f"{type(self.sharded).__name__} of this DeepSpeed keeps its partitions elsewhere")

    @cached_property
    def _partition_of(self) -> dict[str, int]:
        """The partition that holds each trained parameter's share. All of a partition are of one group of the optimizer."""
        name_of = {parameter: name for name, parameter in self.parameters.items()}
        kept_as = ("fp16_groups", "bit16_groups", "bf16_groups")  # by stage 3, by stages 1 and 2, by stage 1 in bf16
        members = next(getattr(self.sharded, attribute) for attribute in kept_as if hasattr(self.sharded, attribute))
        return {name_of[parameter]: index for index, group in enumerate(members) for parameter in group}

    def _share_float32_shards(self) -> None:
        """Let stage 3 step on its float32 shards themselves. It copies them, because it compares a device with a device's name."""
        for partition, shard in zip(self._partitions(), self.sharded.fp16_partitioned_groups_flat, strict=True) if self._is_stage_3 else ():
            if shard is not None and (shard.dtype, shard.device, shard.shape) == (partition.dtype, partition.device, partition.shape):
                partition.data = shard.data

    def _forget_gradients(self) -> None:
        """Zero stage 3's gradients. It keeps them, and would apply a gradient again when its parameter gets none in the next step."""
        if self._is_stage_3:
            self.sharded.grad_partitions_flat_buffer.zero_()
            for partition in self._partitions() if self.sharded.offload_optimizer else ():
                if partition.grad is not None:
                    partition.grad.zero_()

    def _link_moments(self) -> None:
        """Let stages 1 and 2 look up each parameter's moments again. They do so once, when only the first group has any."""
        if not self._is_stage_3 and any(self.steps_taken(name) for name in self.parameters):
            self.sharded._hp_optimizer_states_linked = False
            self.sharded._lazy_init_hp_params_optimizer_state()

    def _set(self, name: str, value: Tensor, key: str | None) -> None:
        """Put a whole parameter or moment into this rank's share of it."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter, value = self.parameters[name], value.to(self.device, torch.float32)
        set_parameter, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if self._is_stage_3:  # its setters of whole values cannot pad a parameter whose size the ranks do not divide
            set_parameter, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
            share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's own attribute
            padded = torch.zeros(share * self.world_size, device=self.device)
            padded[: value.numel()] = value.flatten()
            value = padded[share * self.rank : share * (self.rank + 1)]
        if key is None:
            set_parameter(parameter, value)
        else:
            set_moment(parameter, value, key)


def _gathered(parameter: nn.Parameter):
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
