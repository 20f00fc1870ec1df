"""What every engine offers: one optimizer step over micro-batches, full weights and optimizer state.

An engine moves the trainable parameters of any ``nn.Module`` that is called as ``module(batch, at)`` and returns a dict of scalars
with a ``"loss"``. It knows neither lens nor data. All engines keep their optimizer's state in the same file by parameter name, so that a
run saved by one is read by the other, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from megalens.config import Config
from megalens.device import materialise
from megalens.engine.ranks import Ranks
from megalens.engine.state import MOMENTS, EngineError, OptimizerState, Part, copied, owners

Groups = dict[str, dict[str, nn.Parameter]]
Batch = Mapping[str, Any]  # tensors by name
AnyBatch = TypeVar("AnyBatch", bound=Batch)


class Engine(Ranks, ABC):
    """One optimizer over a module's trainable parameters.

    Args:
        config: the run's configuration.
        module: called as ``module(batch, at)``; returns scalars by name, ``"loss"`` among them.
        groups: its trainable parameters by group and name (``module.parameter_groups()``).
    """

    module: Any  # an nn.Module; what it answers beyond one (``sample``, ``initial``, ``slicing``) only some calls ask of it

    def __init__(self, config: Config, module: nn.Module, groups: Groups):
        super().__init__(device_of(module), config)
        self.config, self.module = config, module
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
        self.moments = MOMENTS[config.optimizer]
        self.parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
        self._group_of = {name: group for group, members in groups.items() for name in members}
        self.resting: set[str] = set()  # names of the trained parameters whose rate is 0 now
        if not self.parameters:
            raise EngineError("nothing is trained: in train_mode=frozen keep verbalizer.trainable_prompt or the projections trainable")

    # ------------------------------------------------------------------------------------------------------ per engine

    @abstractmethod
    def train_step(self, batches: Sequence[Batch], at: Any, rollouts: list[Any] | None = None) -> dict[str, float]:
        """One optimizer step on this rank's share of some global micro-batches.

        Args:
            batches: equal-sized micro-batches.
            at: handed on to the module.
            rollouts: handed on to the module, one with each micro-batch: what :meth:`sample` gave for them.

        Returns:
            the module's scalars averaged over ranks and micro-batches, ``grad_norm`` (before clipping) and ``skipped``: 1 when the
            loss or a gradient of any rank was not finite, or the gradient's norm beyond ``config.grad_limit``, in which case no rank
            has changed a weight.
        """

    @property
    @abstractmethod
    def optimizer_groups(self) -> list[dict]:
        """The optimizer's parameter groups, each with the ``name`` of the module's group it is of."""

    @abstractmethod
    def whole(self, name: str, moment: str | None = None) -> Tensor:
        """A parameter (float32 where it is trained), or what the optimizer keeps for it, whole. Call it on all ranks."""

    @abstractmethod
    def steps_taken(self, name: str) -> float:
        """Steps that the optimizer counts for a trained parameter; 0 where it counts none."""

    @abstractmethod
    def load_state(self, saved: OptimizerState) -> None:
        """Take over the optimizer state that any engine wrote, on however many ranks.

        Raises:
            EngineError: it is of another optimizer or other parameters.
        """

    # ------------------------------------------------------------------------------------------------------- for all

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of each of the module's groups; until then it is ``config.learning_rate``.

        A group at rate 0 rests: its weights, moments and steps stay as they are, whatever the weight decay, and its gradient neither
        counts in the gradient's norm nor has to be finite.
        """
        for group in self.optimizer_groups:
            group["lr"] = rates[group["name"]]
        self.resting = {name for name, group in self._group_of.items() if rates[group] == 0}

    @torch.no_grad()
    def sample(self, batches: Sequence[Batch], at: Any) -> list[Any] | None:
        """What the module samples for micro-batches ahead of a training pass; None: nothing is wanted.

        It is ``module.sample(batches, at, ranks)``, with this engine as ``ranks``: what the module can ask the other processes.
        Every rank must call it with as many micro-batches, as any pass.
        """
        return self.module.sample([to_device(batch, self.device) for batch in batches], at, self)

    # ------------------------------------------------------------------------------------------------------------ state

    def full_state(self, names: list[str]) -> dict[str, Tensor]:
        """Parameters by name, whole, float32, on the CPU of rank 0; ``{}`` on other ranks. Call it on all ranks."""
        values = {}
        for name in names:
            value = self.whole(name)
            if self.is_main:
                values[name] = copied(value)
        return values

    def weights_part(self, names: list[str]) -> Part:
        """This rank's share of the named parameters, to be written. Call it on all ranks."""
        return self._part({name: (name, None) for name in names})

    def optimizer_part(self) -> Part:
        """This rank's share of the optimizer's state. Call it on all ranks."""
        part = self._part({f"{moment}.{name}": (name, moment) for moment in self.moments for name in self.parameters})
        if not self.is_main:
            return part
        taken = {name: self.steps_taken(name) for name in self.parameters}
        steps = {"step": max(taken.values())}
        steps |= {f"step.{name}": count for name, count in taken.items() if count != steps["step"]}  # of what has rested
        return dataclasses.replace(part, tensors=part.tensors | {key: torch.tensor(count) for key, count in steps.items()})

    def _part(self, wanted: dict[str, tuple[str, str | None]]) -> Part:
        owner, count = owners({key: 4 * math.prod(self.shapes[name]) for key, (name, _) in wanted.items()}, self.world_size)
        tensors = {}
        for key, (name, moment) in wanted.items():
            value = self.whole(name, moment)
            if owner[key] == self.rank:
                tensors[key] = copied(value)
        return Part(tensors, self.rank, count)

    # ------------------------------------------------------------------------------------------------- for some engines

    def _is_sound(self, loss: float, norm: float) -> bool:
        """May a step be taken with this loss and gradient norm, both of all ranks? The one rule of every engine."""
        return math.isfinite(loss) and norm <= self.config.grad_limit  # a norm that is no number is not below it

    def _backward(self, batches: Sequence[Batch], at: Any, rollouts: list[Any] | None) -> dict[str, Tensor]:
        """Forward and backward of micro-batches by PyTorch alone; the module's scalars averaged over them, float64, on this rank."""
        total: dict[str, Tensor] = {}
        for batch, rollout in with_rollouts(batches, rollouts):
            terms = self.module(to_device(batch, self.device), at, *rollout)
            (terms["loss"] / len(batches)).backward()
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + value.detach().double()
        return {name: value / len(batches) for name, value in total.items()}


def fill(module: Any, unit: list[nn.Module], weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the parameters of some parts of a module that are still on the meta device their values.

    Args:
        module: says what a parameter starts as (``module.initial(name)``).
        unit: the parts.
        weights: values of some parameters, by name.
    """
    inside = {parameter for part in unit for parameter in part.parameters() if parameter.is_meta}
    for name, parameter in module.named_parameters():
        if parameter in inside:
            materialise(parameter, weights[name] if name in weights else module.initial(name), device)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, whether or not all of its parameters are there yet."""
    return next(p.device for p in module.parameters() if not p.is_meta)


def optimizer_groups(config: Config, groups: Groups) -> list[dict]:
    """Parameter groups: ``name`` of the module's group, ``params``, ``lr`` and ``weight_decay``.

    Weight decay is for matrices: never for prompts, norms and biases.
    """
    result = []
    for group, members in groups.items():
        for decays in (True, False):
            chosen = [p for p in members.values() if (p.ndim >= 2 and not group.endswith("prompt")) == decays]
            if chosen:
                result.append(
                    {
                        "name": group,
                        "params": chosen,
                        "lr": config.learning_rate,
                        "weight_decay": config.weight_decay if decays else 0.0,
                    }
                )
    return result


def build_optimizer(config: Config, groups: list[dict], fused: bool) -> torch.optim.Optimizer:
    """The optimizer that ``config`` asks for, over parameter groups. It takes no notice of a group while its rate is 0."""
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=config.learning_rate, fused=fused)
    else:
        beta_1, beta_2 = config.betas
        optimizer = torch.optim.AdamW(groups, betas=(beta_1, beta_2), fused=fused)
    aside: list[tuple[Tensor, Tensor | None]] = []

    def put_aside(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["lr"] == 0 else ():
                aside.append((parameter, parameter.grad))
                parameter.grad = None  # what has no gradient, the optimizer passes over

    def put_back(*_: Any) -> None:
        while aside:
            parameter, gradient = aside.pop()
            parameter.grad = gradient

    optimizer.register_step_pre_hook(put_aside)
    optimizer.register_step_post_hook(put_back)
    return optimizer


def to_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """The batch on the engine's device."""
    return cast(AnyBatch, {name: value.to(device, non_blocking=True) for name, value in batch.items()})


def with_rollouts(batches: Sequence[Batch], rollouts: list[Any] | None) -> Iterator[tuple[Batch, tuple[Any, ...]]]:
    """Each micro-batch with what the module takes behind it: its rollouts, or nothing."""
    yield from zip(batches, [()] * len(batches) if rollouts is None else [(each,) for each in rollouts], strict=True)
