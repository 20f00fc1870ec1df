"""Writing a lens as other readers of natural language autoencoders take it; what they cannot be told is refused with the reason."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import read_json
from megalens.checkpoint.formats.format import LoadedLens
from megalens.checkpoint.formats.megalens import versions
from megalens.checkpoint.formats.merged import merged_state, save_model, untied
from megalens.checkpoint.formats.nla import HEAD, STATISTICS
from megalens.checkpoint.formats.nla_sidecar import EXPLANATION, SLOT, escaped, layer_keys, write_sidecar
from megalens.config import Config, config_to_dict
from megalens.files import save_json, save_tensors
from megalens.lens.lens import ConsistencyLens
from megalens.lens.prompts import prompts_of
from megalens.lens.verbalizer import StandardisedLinear

_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


def export(folder: Path, loaded: LoadedLens) -> None:
    """Write ``av/`` and ``ar/`` into a folder that does not exist yet, all of it or nothing.

    Raises:
        CheckpointError: the format cannot say this lens, or something lies there already.
    """
    lens = loaded.lens
    check_can_say(lens)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already; name a folder that is not, or remove it")
    scratch = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        about = _about(lens)
        _write_av(scratch / "av", loaded, about)
        _write_ar(scratch / "ar", lens, about)
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_can_say(lens: ConsistencyLens) -> None:
    """Refuse a lens that the format cannot say.

    Raises:
        CheckpointError: with every reason.
    """
    c, v, r = lens.config, lens.config.verbalizer, lens.config.reconstructor
    settings = lens.subject.lm.model.config
    reasons = {
        "verbalizer.inject is not embedding": v.inject != "embedding",
        "verbalizer.inject_norm is null: a trained projection cannot be written down": v.inject_norm is None,
        "verbalizer.marker is null": v.marker is None,
        "verbalizer.trainable_prompt is true: prompts are token ids": v.trainable_prompt,
        "reconstructor.trainable_prompt is true: prompts are token ids": r.trainable_prompt,
        "tail_order is last_first: readers take the text as it is printed": c.tail_order != "forward",
        "verbalizer.tag is not explanation": v.tag != "explanation",
        "verbalizer.end_token is not eos: readers would let it run on": v.end_token != "eos",
        "the model is inside a wrapper, whose width readers do not find": settings.get_text_config() is not settings,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise CheckpointError(f"this lens cannot be written as nla: {'; '.join(found)}. conf/nla.yaml trains one that can")


def fold_head(head: StandardisedLinear) -> tuple[Tensor, Tensor]:
    """An affine head ``mean + S (W (h - mean) / S + b)`` as ``A (h + t)``: A ``[D, D]`` and t ``[D]``, float64."""
    std_D, mean_D = head.std.double(), head.mean.double()
    weight_DD, bias_D = head.linear.weight.detach().double(), head.linear.bias.detach().double()
    scale_D, offset_D = head.scale.double(), head.offset.double()
    a_DD = scale_D[:, None] * weight_DD / std_D
    rest_D = offset_D + scale_D * bias_D - a_DD @ mean_D
    return a_DD, torch.linalg.solve(a_DD, rest_D)


def _write_av(folder: Path, loaded: LoadedLens, about: dict[str, Any]) -> None:
    lens = loaded.lens
    state = untied(lens, merged_state(lens, "verbalizer", lens.subject.lm.num_blocks))
    save_model(folder, state, _settings(lens, lens.subject.lm.num_blocks))
    tokenizer = copy.deepcopy(lens.tokenizer)
    if not lens.config.verbalizer.chat:
        starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        if starts:
            tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    save_tensors(folder / STATISTICS, {name: value.cpu() for name, value in vars(loaded.statistics).items()})
    own = {"config": config_to_dict(lens.config), "fingerprint": lens.subject.fingerprint, "version": versions()["megalens"]}
    write_sidecar(folder, {**about, "role": "av", "injection": {"mode": "replace_embedding", "norm": "fixed"}, "megalens": own})


def _write_ar(folder: Path, lens: ConsistencyLens, about: dict[str, Any]) -> None:
    blocks = lens.config.layer_l + 1
    state, settings = merged_state(lens, "reconstructor", blocks), _settings(lens, blocks)
    head = lens.reconstructor.head
    dtype = head.linear.weight.dtype
    if isinstance(head, StandardisedLinear):
        weight, shift_D = fold_head(head)
        if shift_D.abs().max() > 1e-6 * head.std.abs().max():
            _shift(lens, state, settings, blocks, shift_D)
    else:
        weight = head.linear.weight.detach()
    places = {module: path for path, module in lens.subject.lm.model.named_modules()}
    norm = places[lens.subject.lm.norm]
    state = {name: value for name, value in untied(lens, state).items() if not name.startswith(("lm_head.", f"{norm}."))}
    state[f"{norm}.weight"] = torch.ones(lens.subject.d, dtype=lens.subject.lm.dtype)  # readers throw it away; some want it there
    save_model(folder, state, settings | {"tie_word_embeddings": True})
    save_tensors(folder / HEAD, {"weight": weight.to(dtype).cpu()}, {"format": "pt"})
    lens.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    written = read_json(path) | {"padding_side": "right"}
    if lens.tokenizer.bos_token_id is not None and lens.tokenizer("a")["input_ids"][:1] != [lens.tokenizer.bos_token_id]:
        written["bos_token"] = None  # readers refuse one that does not come first
    save_json(path, written)
    extraction = about["extraction"] | {"injection_scale": None}
    write_sidecar(folder, {**about, "role": "ar", "extraction": extraction})


def _shift(lens: ConsistencyLens, state: dict[str, Tensor], settings: dict[str, Any], blocks: int, shift_D: Tensor) -> None:
    """Add a constant to the last block's output as a bias of its MLP, which Llama's configuration can ask for."""
    if "mlp_bias" not in settings:
        what = "the head has an offset, and this make of models has no bias that could hold it"
        raise CheckpointError(f"this lens cannot be written as nla: {what}; train with reconstructor.head=linear")
    settings["mlp_bias"] = True
    for name in [name for name in state if ".mlp." in name and name.endswith("_proj.weight")]:
        state[name.removesuffix("weight") + "bias"] = torch.zeros(state[name].shape[0], dtype=state[name].dtype)
    places = {module: path for path, module in lens.subject.lm.model.named_modules()}
    last = f"{places[lens.subject.lm.blocks[blocks - 1]]}.mlp.down_proj.bias"
    state[last] = shift_D.to(state[last].dtype).cpu()


def _settings(lens: ConsistencyLens, blocks: int) -> dict[str, Any]:
    """``config.json`` of a model with so many of the subject's blocks."""
    settings = lens.subject.lm.model.config.to_dict()
    key = next(key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in settings)
    settings[key] = blocks
    for name in _PER_LAYER:
        if isinstance(settings.get(name), list):
            settings[name] = settings[name][:blocks]
    settings |= {"architectures": [type(lens.subject.lm.model).__name__], "dtype": str(lens.subject.lm.dtype).removeprefix("torch.")}
    return settings


def _about(lens: ConsistencyLens) -> dict[str, Any]:
    """What both sidecars say."""
    c = lens.config
    prompts, tokenizer = prompts_of(c, lens.tokenizer), lens.tokenizer
    suffix = tokenizer(c.reconstructor.suffix, add_special_tokens=False)["input_ids"][1:]
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": None,
        "stage": "rl",
        "base_checkpoint": c.model_name,
        "d_model": lens.subject.d,
        **layer_keys(c.layer_l),
        "extraction": {"injection_scale": c.verbalizer.inject_norm, "mse_scale": lens.subject.d**0.5, "layer_index": c.layer_l},
        "tokens": {
            "injection_char": c.verbalizer.marker,
            "injection_token_id": prompts.marker[0],
            "injection_left_neighbor_id": prompts.left[-1],
            "injection_right_neighbor_id": prompts.right[0],
            "critic_suffix_ids": suffix or None,
        },
        "prompt_templates": _templates(c),
        "created_by": f"megalens {versions()['megalens']}",
    }


def _templates(c: Config) -> dict[str, str]:
    left, right = c.verbalizer.prompt.split("<act>")
    return {
        "av": escaped(left) + SLOT + escaped(right),
        "ar": escaped(c.reconstructor.prompt) + EXPLANATION + escaped(c.reconstructor.suffix),
    }
