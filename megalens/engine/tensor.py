"""Tensor parallelism: the matrices of a block in slices on the ranks of a node, which work on the same samples.

A layer is sliced by its outputs (``colwise``) or its inputs (``rowwise``); what stands between the two, heads or hidden units, is computed
by one rank each. PyTorch's own styles do the work, so that ``fully_shard`` shards the slices again over nodes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel, parallelize_module

from megalens.engine.ranks import Traffic

HEADS = 2  # the axis of heads in [B, S, heads, head_dim], where attention norms its queries and keys


def slice_layers(module: nn.Module, slicing: dict[str, str], mesh: DeviceMesh, traffic: Traffic) -> None:
    """Leave each rank its slices of a module's layers, adapters included.

    Args:
        module: a block, whole and the same on all ranks of ``mesh``. What ``slicing`` does not name stays whole.
        slicing: ``colwise``, ``rowwise`` or ``heads`` (a norm over single heads) by path within the module.
        mesh: of one dimension.
        traffic: where the sums over ranks are counted.
    """
    styles: dict[str, Callable[[], ParallelStyle]] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "heads": lambda: SequenceParallel(sequence_dim=HEADS, use_local_output=True),
    }
    layers = {layer: kind for path, kind in slicing.items() for layer in _layers(module, path, kind)}
    parallelize_module(module, mesh, {path: styles[kind]() for path, kind in layers.items()}, src_data_rank=None)
    for path, kind in layers.items():
        if kind == "rowwise":
            module.get_submodule(path).register_forward_hook(lambda _, inputs, output: traffic.add("all_reduce", output))
    colwise = [path for path, kind in slicing.items() if kind == "colwise"]
    for path in colwise:
        _leave_gradient_in_parts(module.get_submodule(path), mesh, traffic)
    for path in {path.rpartition(".")[0] for path in colwise}:
        _sum_gradient_once(module.get_submodule(path), mesh, traffic)


def _leave_gradient_in_parts(layer: nn.Module, mesh: DeviceMesh, traffic: Traffic) -> None:
    """Of what enters a layer that is sliced by its outputs, each rank keeps the gradient that comes from its slice."""

    def enter(_, inputs: tuple[Tensor, ...]) -> DTensor:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False, grad_placements=[Partial()])

    getattr(layer, "base_layer", layer).register_forward_pre_hook(enter, prepend=True)
    for first in getattr(layer, "lora_A", {}).values():  # whole, so each rank has all of its gradient: a part is as much as any
        first.register_forward_pre_hook(lambda _, inputs: _with_gradient(inputs[0], lambda gradient: gradient / mesh.size()))
    for second in getattr(layer, "lora_B", {}).values():
        second.register_forward_pre_hook(lambda _, inputs: _counted(inputs[0], traffic), prepend=True)


def _sum_gradient_once(module: nn.Module, mesh: DeviceMesh, traffic: Traffic) -> None:
    """Sum the parts of a gradient where all layers of an attention or MLP have added to it, in place of once per layer."""

    def total(gradient: Tensor) -> Tensor:
        traffic.add("all_reduce", gradient)
        return DTensor.from_local(gradient, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()

    def enter(_, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        if inputs:
            return (_with_gradient(inputs[0], total), *inputs[1:]), named
        return inputs, named | {"hidden_states": _with_gradient(named["hidden_states"], total)}

    module.register_forward_pre_hook(enter, with_kwargs=True)


def _with_gradient(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The same value, whose gradient is changed on its way on."""
    if not value.requires_grad:
        return value
    value = value.view_as(value)
    value.register_hook(change)
    return value


def _counted(entering: Tensor, traffic: Traffic) -> Tensor:
    """The same value; the sum that PyTorch makes of its gradient is counted."""

    def count(gradient: Tensor) -> Tensor:
        traffic.add("all_reduce", gradient)
        return gradient

    return _with_gradient(entering, count)


def _layers(module: nn.Module, path: str, kind: str) -> list[str]:
    """A layer's path or, where it carries adapters, those of its matrices that are sliced with it.

    An adapter's first matrix of a layer sliced by outputs is whole, its second one that of a layer sliced by inputs.
    """
    layer = module.get_submodule(path)
    if not hasattr(layer, "base_layer"):
        return [path]
    sliced = "lora_B" if kind == "colwise" else "lora_A"
    return [f"{path}.base_layer", *(f"{path}.{sliced}.{name}" for name in getattr(layer, sliced))]
