"""Tensor parallelism: the matrices of a block in slices on the ranks of a node, which work on the same samples.

A layer is sliced by its outputs (``colwise``) or its inputs (``rowwise``); what stands between the two, heads or hidden units, is computed
by one rank each. PyTorch's own styles do the work, so that ``fully_shard`` shards the slices again over nodes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from megalens.engine.base import Traffic

HEADS = 2  # the axis of heads in [B, S, heads, head_dim], where attention norms its queries and keys


def slice_layers(module: nn.Module, slicing: dict[str, str], mesh: DeviceMesh, traffic: Traffic) -> None:
    """Leave each rank its slices of a module's layers, adapters included.

    Args:
        module: a block, whole and the same on all ranks of ``mesh``. What ``slicing`` does not name stays whole.
        slicing: ``colwise``, ``rowwise`` or ``heads`` (a norm over single heads) by path within the module.
        mesh: of one dimension.
        traffic: where the sums over ranks are counted.
    """
    styles = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "heads": lambda: SequenceParallel(sequence_dim=HEADS, use_local_output=True),
    }
    layers = {layer: kind for path, kind in slicing.items() for layer in _layers(module, path, kind)}
    parallelize_module(module, mesh, {path: styles[kind]() for path, kind in layers.items()}, src_data_rank=None)
    for path, kind in layers.items():
        layer = module.get_submodule(path)
        if kind == "rowwise":
            layer.register_forward_hook(lambda _, inputs, output: traffic.add("all_reduce", output))
        if kind == "colwise":
            layer.register_forward_pre_hook(lambda _, inputs: _count_gradient(inputs[0], traffic), prepend=True)


def _layers(module: nn.Module, path: str, kind: str) -> list[str]:
    """A layer's path or, where it carries adapters, those of its matrices that are sliced with it.

    An adapter's first matrix of a layer sliced by outputs is whole, its second one that of a layer sliced by inputs.
    """
    layer = module.get_submodule(path)
    if not hasattr(layer, "base_layer"):
        return [path]
    sliced = "lora_B" if kind == "colwise" else "lora_A"
    return [f"{path}.base_layer", *(f"{path}.{sliced}.{name}" for name in getattr(layer, sliced))]


def _count_gradient(entering: Tensor, traffic: Traffic) -> None:
    if entering.requires_grad:
        entering.register_hook(lambda gradient: traffic.add("all_reduce", gradient))
