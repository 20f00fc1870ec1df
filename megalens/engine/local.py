"""The local engine: one process, or several under torchrun that average their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalens.config import Config
from megalens.engine.base import Batch, Engine, Groups, build_optimizer, optimizer_groups
from megalens.engine.state import OptimizerState

PART = 2**20  # numbers that are float64 at once


class LocalEngine(Engine):
    """The optimizer on float32 masters of the trainable parameters.

    The module computes in its own dtype; where that is not float32, each trainable parameter has a float32 master that the optimizer moves
    and that is rounded back after the step. Gradients of all micro-batches and ranks are summed in float32, in one flat buffer: one
    collective per step, and a parameter that got no gradient on some rank counts as zero there.

    Args:
        weights: float32 values of trainable parameters, where they are known more exactly than the module holds them.
    """

    def __init__(self, config: Config, module: nn.Module, groups: Groups, weights: dict[str, Tensor] | None = None):
        super().__init__(config, module, groups)
        weights = weights or {}
        self.masters = {name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for name, p in self.parameters.items()}
        with torch.no_grad():
            for name in self.masters.keys() & weights.keys():
                self.masters[name].copy_(weights[name])
        self._same_start()
        self.gradient = torch.zeros(sum(p.numel() for p in self.masters.values()), device=self.device)
        views = self.gradient.split([p.numel() for p in self.masters.values()])
        self.gradients = {name: view.view_as(p) for (name, p), view in zip(self.masters.items(), views, strict=True)}
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._collector(self.gradients[name]))
        by_parameter = {parameter: self.masters[name] for name, parameter in self.parameters.items()}
        options = [{**group, "params": [by_parameter[p] for p in group["params"]]} for group in optimizer_groups(config, groups)]
        self.optimizer = build_optimizer(config, options, fused=self.device.type in ("cpu", "cuda"))

    def train_step(self, batches: Sequence[Batch], at: Any, rollouts: list[Any] | None = None) -> dict[str, float]:
        self.gradient.zero_()
        means = self._backward(batches, at, rollouts)
        metrics = self.reduce_mean({name: value.item() for name, value in means.items()})
        self._sum(self.gradient)
        self.gradient /= self.world_size
        for name in self.resting:
            self.gradients[name].zero_()
        norm = self._norm()
        sound = self._is_sound(metrics["loss"], norm.item())
        if sound:
            self._update(norm)
        return metrics | {"grad_norm": norm.item(), "skipped": float(not sound)}

    def _norm(self) -> Tensor:
        """Of the gradient, in float64 (a float32 sum on a CPU is wrong by 6e-4 of 10M values), which is never there as a whole."""
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in self.gradient.split(PART)]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _update(self, norm: Tensor) -> None:
        if self.config.grad_clip:
            self.gradient *= (self.config.grad_clip / (norm + 1e-6)).clamp_max(1.0)
        for name, master in self.masters.items():
            master.grad = self.gradients[name]
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                master.grad = None
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)

    @property
    def optimizer_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def whole(self, name: str, moment: str | None = None) -> Tensor:
        if moment is None:
            return self.masters[name] if name in self.masters else self.module.get_parameter(name)
        state = self.optimizer.state.get(self.masters[name])
        return state[moment] if state else torch.zeros(self.shapes[name])

    def steps_taken(self, name: str) -> float:
        state = self.optimizer.state.get(self.masters[name], {})
        return float(state.get("step", 0.0))

    def load_state(self, saved: OptimizerState) -> None:
        saved.expect(self.moments, {name: self.shapes[name] for name in self.masters})
        for name, master in self.masters.items() if self.moments else ():
            moments = {key: value.to(self.device) for key, value in saved.moments(name).items()}
            self.optimizer.state[master] = {"step": torch.tensor(saved.steps_taken(name), device=self.device), **moments}

    def _same_start(self) -> None:
        """Rank 0's values on every rank, and the module's own parameters rounded from the masters."""
        with torch.no_grad():
            for name, master in self.masters.items():
                if self.world_size > 1:
                    torch.distributed.broadcast(master.data, 0)
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)

    @staticmethod
    def _collector(total: Tensor):
        def collect(parameter: Tensor) -> None:
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

        return collect
