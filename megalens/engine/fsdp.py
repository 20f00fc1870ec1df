"""FSDP2: parameters, gradients and optimizer state in shards over the ranks, by PyTorch's own ``fully_shard``.

The module's ``shard_units()``, lists of modules, are sharded and gathered as one. A unit of several modules (tied embeddings) stays
gathered through a forward or backward pass. Units that fit into ``fsdp.gather_gb`` are gathered once per micro-step. All others are
gathered whenever one of their modules is called. With ``fsdp.tensor_ranks``, ranks that hold the same slices of matrices
(:mod:`megalens.engine.tensor`) shard and gather those slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megalens.config import Config, Fsdp
from megalens.engine.base import (
    Batch,
    Engine,
    EngineError,
    Groups,
    build_optimizer,
    device_of,
    fill,
    optimizer_groups,
)
from megalens.engine.ranks import Ranks, Traffic, join_alone
from megalens.engine.state import OptimizerState
from megalens.engine.tensor import slice_layers

_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in PyTorch 2.13
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
AXES = ("replicate", "shard", "tensor")  # of the mesh; where there is one copy of the model, without the first


class FsdpEngine(Engine):
    """Steps on float32 shards of the trainable parameters. Frozen parameters are sharded in their own dtype.

    Args:
        weights: float32 values of trainable parameters, where they are known more exactly than the module holds them.

    Raises:
        EngineError: ``fsdp.shard_ranks`` does not divide the ranks, or ``fsdp.tensor_ranks`` not the ranks of a copy.
        ConfigError: the module cannot be sliced for ``fsdp.tensor_ranks``.
    """

    def __init__(self, config: Config, module: nn.Module, groups: Groups, weights: dict[str, Tensor] | None = None):
        join_alone(device_of(module))
        super().__init__(config, module, groups)
        compute_dtype = next(iter(self.parameters.values())).dtype
        weights, by_parameter = weights or {}, {parameter: name for name, parameter in self.parameters.items()}
        chosen = optimizer_groups(config, groups)

        def prepare(unit: list[nn.Module], whole: set[nn.Parameter]) -> None:
            fill(module, unit, weights, self.device)
            self._widen({name: p for name, p in self.parameters.items() if p in whole}, weights)

        self._sharded, self._slices = shard(self, config, module, compute_dtype, prepare)
        parameters = dict(module.named_parameters())
        self.parameters = {name: parameters[name] for name in self.parameters}
        self.shards = cast(dict[str, DTensor], parameters)
        self.masters = {name: nn.Parameter(self.shards[name].to_local().detach()) for name in self.parameters}
        chosen = [{**group, "params": [self.masters[by_parameter[p]] for p in group["params"]]} for group in chosen]
        self.optimizer = build_optimizer(config, chosen, fused=True)

    def train_step(self, batches: Sequence[Batch], at: Any, rollouts: list[Any] | None = None) -> dict[str, float]:
        means = self._backward(batches, at, rollouts)
        self._reshard()
        metrics = self.reduce_mean({name: value.item() for name, value in means.items()})
        gradients = {name: self._take_gradient(name) for name in self.masters}
        for name in self.resting:
            gradients[name].zero_()
        self._agree(gradients)
        norm = self._norm(gradients)
        sound = self._is_sound(metrics["loss"], norm.item())
        if sound:
            self._update(gradients, norm)
        return metrics | {"grad_norm": norm.item(), "skipped": float(not sound)}

    def _update(self, gradients: dict[str, Tensor], norm: Tensor) -> None:
        clip = (self.config.grad_clip / (norm + 1e-6)).clamp_max(1.0).item() if self.config.grad_clip else 1.0
        for name, master in self.masters.items():
            master.grad = gradients[name].mul_(clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def optimizer_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def whole(self, name: str, moment: str | None = None) -> Tensor:
        shard = self.shards[name]
        if moment is None:
            self._reshard()
            local = self.shards[name].to_local()
        else:
            state = self.optimizer.state.get(self.masters[name])
            local = state[moment] if state else torch.zeros_like(self.masters[name])
        local = local.detach().to(self.device)
        return DTensor.from_local(
            local, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
        ).full_tensor()

    def steps_taken(self, name: str) -> float:
        state = self.optimizer.state.get(self.masters[name], {})
        return float(state.get("step", 0.0))

    def load_state(self, saved: OptimizerState) -> None:
        saved.expect(self.moments, {name: self.shapes[name] for name in self.masters})
        for name, master in self.masters.items() if self.moments else ():
            shard = self.shards[name]
            shape, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
            place = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
            moments = {key: value.to(master.device) for key, value in saved.moments(name, place).items()}
            self.optimizer.state[master] = {"step": torch.tensor(saved.steps_taken(name), device=master.device), **moments}

    def _widen(self, parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
        """Make trained parameters float32, with the same values on every rank."""
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.data = weights[name].to(self.device).float() if name in weights else parameter.data.float()
                if self.world_size > 1:
                    dist.broadcast(parameter.data, 0)

    def _reshard(self) -> None:
        for part in self._sharded:
            part.reshard()

    def _take_gradient(self, name: str) -> Tensor:
        """This rank's shard of a gradient, averaged over the ranks; zeros where there was none."""
        shard, master = self.shards[name], self.masters[name]
        gradient, shard.grad = cast(DTensor | None, shard.grad), None
        return torch.zeros_like(master) if gradient is None else gradient.to_local()

    def _agree(self, gradients: dict[str, Tensor]) -> None:
        """Give tensor-parallel ranks one gradient of what they all hold. Theirs differ where a kernel sums in no fixed order."""
        if self.config.fsdp.tensor_ranks == 1:
            return
        same = [gradient for name, gradient in gradients.items() if not self._is_slice(self.shards[name])]
        flat = torch.cat([gradient.flatten() for gradient in same]).to(self.device)
        self.traffic.add("all_reduce", flat)
        dist.all_reduce(flat, group=self._slices.get_group())
        flat /= self.config.fsdp.tensor_ranks
        for gradient, mean in zip(same, flat.split([gradient.numel() for gradient in same]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    @staticmethod
    def _is_slice(shard: DTensor) -> bool:
        return "tensor" in (shard.device_mesh.mesh_dim_names or ()) and not shard.placements[-1].is_replicate()

    def _norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Norm of the whole gradient; a shard that several ranks hold counts once."""
        squares = [gradient.double().square().sum() / self._copies(name) for name, gradient in gradients.items()]
        total = torch.stack(squares).sum().to(self.device)
        self._sum(total)
        return total.sqrt().float()

    def _copies(self, name: str) -> int:
        """How many ranks hold the same shard of a parameter."""
        shard = self.shards[name]
        cut = zip(shard.device_mesh.shape, shard.placements, strict=True)
        return self.world_size // math.prod(size for size, placement in cut if not placement.is_replicate())


def shard(
    ranks: Ranks,
    config: Config,
    module: Any,
    compute_dtype: torch.dtype | None,
    prepare: Callable[[list[nn.Module], set[nn.Parameter]], None],
) -> tuple[list[FSDPModule], DeviceMesh]:
    """Shard a module, one of its ``shard_units()`` at a time.

    Args:
        compute_dtype: in which parameters are gathered; None: in their own.
        prepare: called with each unit and its parameters before it is sharded; they must be off the meta device then.

    Returns:
        What is gathered as one, and the ranks that slice the same layers, as a mesh.

    Raises:
        EngineError: ``fsdp.shard_ranks`` does not divide the ranks, or ``fsdp.tensor_ranks`` not the ranks of a copy.
        ConfigError: the module cannot be sliced for ``fsdp.tensor_ranks``.
    """
    mesh = _mesh(config.fsdp, ranks.device.type, ranks.world_size)
    slicing = module.slicing(config.fsdp.tensor_ranks) if config.fsdp.tensor_ranks > 1 else {}
    options: dict[str, Any] = {
        "mesh": mesh[AXES[-mesh.ndim : -1]],
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if config.fsdp.offload else OffloadPolicy(),
    }
    room, sharded = config.fsdp.gather_gb * 2**30, set()
    for unit in getattr(module, "shard_units", list)():
        whole = {parameter for part in unit for parameter in part.parameters()}
        size = sum(p.numel() * (compute_dtype or p.dtype).itemsize for p in whole) // config.fsdp.tensor_ranks
        prepare(unit, whole)
        for part in unit:
            if part in slicing:
                slice_layers(part, slicing[part], mesh["tensor"], ranks.traffic)
        fully_shard(unit if len(unit) > 1 else unit[0], reshard_after_forward=True, **options)
        for parameter in whole:  # others may refer to it; its shard is what counts from now on
            parameter.data = parameter.data.new_empty(0)
        sharded |= whole
        if size <= room and len(unit) == 1:
            unit[0].set_reshard_after_forward(False)
            unit[0].set_reshard_after_backward(False)
            room -= size
    prepare([], set(module.parameters()) - sharded)
    fully_shard(module, **options)
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_custom_all_gather(_AllGather(ranks.traffic))  # type: ignore[arg-type]  # PyTorch's class of it is private
        part.set_custom_reduce_scatter(_ReduceScatter(ranks.traffic))  # type: ignore[arg-type]
    module._get_fsdp_state()._lazy_init()  # this module is the root, also when a part of it is called first
    return parts, mesh["tensor"]


def _mesh(fsdp: Fsdp, device_type: str, ranks: int) -> DeviceMesh:
    """The ranks as a mesh of :data:`AXES`."""
    copy = fsdp.shard_ranks or ranks
    if ranks % copy:
        raise EngineError(f"fsdp.shard_ranks={copy} does not divide the {ranks} processes")
    if copy % fsdp.tensor_ranks:
        raise EngineError(f"fsdp.tensor_ranks={fsdp.tensor_ranks} does not divide the {copy} processes that share a copy of the model")
    shape = ranks // copy, copy // fsdp.tensor_ranks, fsdp.tensor_ranks
    first = int(copy == ranks)
    return init_device_mesh(device_type, shape[first:], mesh_dim_names=AXES[first:])


class _Collective:
    """A collective of FSDP that is counted."""

    def __init__(self, traffic: Traffic):
        self.traffic = traffic

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Collective):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False):
        self.traffic.add("all_gather", output_tensor)
        return _gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Collective):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op, async_op: bool = False):
        self.traffic.add("reduce_scatter", input_tensor)
        return _scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
