"""A role's weights as a model of their own: the base's, with the role's adapters added in, or its own blocks in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import read_tensors
from megalens.files import save_json, save_tensors
from megalens.lens.lens import ConsistencyLens

SHARD_BYTES = 4 << 30


@torch.no_grad()
def merged_state(lens: ConsistencyLens, role: str, blocks: int) -> dict[str, Tensor]:
    """The model's state dict with a role's changes, blocks above ``blocks`` left out; values on the CPU, in the lens's dtype.

    Args:
        role: ``verbalizer`` or ``reconstructor``.
        blocks: how many of them.
    """
    from peft.tuners.lora import LoraLayer

    lm, part = lens.subject.lm, getattr(lens, role)
    places = {module: path for path, module in lm.model.named_modules()}
    paths = [places[block] for block in lm.blocks]
    own = {f"{paths[int(number)]}.{name}": value for number, block in part.own.items() for name, value in block.state_dict().items()}
    if role == "verbalizer" and part.own_norm is not None:
        own |= {f"{places[lm.norm]}.{name}": value for name, value in part.own_norm.state_dict().items()}
    added = {
        f"{places[layer]}.weight": layer.get_delta_weight(part.adapter)  # type: ignore[attr-defined]  # of every kind of layer we adapt
        for layer in lm.adapted
        if isinstance(layer, LoraLayer) and part.adapter in layer.lora_A
    }
    left_out = tuple(f"{path}." for path in paths[blocks:])
    state = {}
    for name, value in lm.model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name or plain.startswith(left_out):
            continue
        merged = own.get(plain, value)
        if plain in added:
            merged = (merged.float() + added[plain].float()).to(value.dtype)
        state[plain] = merged.detach().cpu().contiguous()
    return state


def untied(lens: ConsistencyLens, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what is tied to another weight: a file must hold one input embedding and no copy of it."""
    tied = getattr(lens.subject.lm.model, "all_tied_weights_keys", None) or {}
    return {name: value for name, value in state.items() if name not in tied}


def save_model(folder: Path, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write weights (shards with an index where they are large) and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) == 1:
        save_tensors(folder / "model.safetensors", shards[0], {"format": "pt"})
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            save_tensors(folder / name, shard, {"format": "pt"})
        held = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        save_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(v.nbytes for v in state.values())}, "weight_map": held}
        )
    save_json(folder / "config.json", settings)


def read_model(folder: Path) -> dict[str, Tensor]:
    """All weights of a model's folder.

    Raises:
        CheckpointError: they are missing, damaged, or a name leads out of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"{folder} holds no model.safetensors; fetch the checkpoint anew")
        return read_tensors(folder / "model.safetensors")
    try:
        held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(held.values()))
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of weights: it is damaged; fetch it anew") from None
    if outside:
        raise CheckpointError(f"{index} names a file outside its folder: {outside[0]}")
    state: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}, which its index names; fetch the checkpoint anew")
        state |= read_tensors(folder / name)
    if missing := held.keys() - state.keys():
        raise CheckpointError(f"{folder} lacks the weight {min(missing)}, which its index names; fetch the checkpoint anew")
    return state
