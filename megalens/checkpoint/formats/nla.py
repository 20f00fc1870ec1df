"""The format of natural language autoencoders that other tools read: two models with merged weights, and a sidecar in each.

``av/`` is the verbalizer, ``ar/`` the reconstructor: the first ``layer_l + 1`` blocks and ``value_head.safetensors``. Writing is in
:mod:`megalens.checkpoint.formats.nla_export`. conf/nla.yaml trains a lens that the format can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.checksums import read_json, read_tensors
from megalens.checkpoint.formats.format import LoadedLens
from megalens.checkpoint.formats.merged import read_model
from megalens.checkpoint.formats.nla_sidecar import EXPLANATION, FILE, SLOT, Sidecar, read_sidecar
from megalens.config import Config, config_from_dict
from megalens.families.loading import load_tokenizer, subject_fingerprint
from megalens.lens.lens import ConsistencyLens
from megalens.lens.names import module_names
from megalens.lens.prompts import chat_prompt
from megalens.statistics import ActivationStatistics

HALVES = {"av": "verbalizer", "ar": "reconstructor"}
STATISTICS = "megalens_stats.safetensors"
HEAD = "value_head.safetensors"
LONGEST_TEXT = 200  # tokens, as other readers of a lens that does not say let it speak


class Nla:
    """A pair of folders ``av/`` and ``ar/``."""

    name = "nla"
    looked_for = f"av/{FILE}"

    def detect(self, folder: Path) -> bool:
        """Does it hold a sidecar in ``av/``?"""
        return (folder / self.looked_for).is_file()

    def read_config(self, folder: Path, arguments: Sequence[str] = (), **changes: Any) -> Config:
        """See :class:`megalens.checkpoint.formats.format.Format`. Both roles have weights of their own (mode full)."""
        av, ar = read_pair(folder)
        own = av.own.get("config")
        values = dict(own) if isinstance(own, dict) else _settings(av, ar)
        values.pop("trust_remote_code", None)  # a checkpoint must not allow itself to run code
        for role in HALVES.values():
            section = values.get(role)
            values[role] = (section if isinstance(section, dict) else {}) | {"mode": "full"} | changes.pop(role, {})
        return config_from_dict(values | {"init_from": None} | changes, arguments)

    def load(self, folder: Path, **changes: Any) -> LoadedLens:
        """See :class:`megalens.checkpoint.formats.format.Format`."""
        from megalens.objective import build_lens

        (av, ar), config = read_pair(folder), self.read_config(folder, **changes)
        fingerprint = subject_fingerprint(config)
        if av.own.get("fingerprint", fingerprint) != fingerprint:
            what = f"{folder} was made from {av.base} with weights {av.own['fingerprint']}, not these ({fingerprint})"
            raise CheckpointError(f"{what}; set model_name to where that model lies")
        check_prompt(folder / "av", av, config)
        statistics = _statistics(folder, config, av.width)
        states = {half: checked_weights(folder / half, half) for half in HALVES}
        head_DD = _head(folder / "ar", ar.width)
        lens = build_lens(config, statistics.mean, statistics.var, to_train=False)
        _check_subject(folder, lens, av, states["av"])
        lens.load_lens_state(_weights(folder, lens, states, head_DD))
        return LoadedLens(lens.eval(), statistics)

    def save(self, folder: Path, loaded: LoadedLens) -> None:
        """See :class:`megalens.checkpoint.formats.format.Format`."""
        from megalens.checkpoint.formats.nla_export import export

        export(folder, loaded)


def read_pair(folder: Path) -> tuple[Sidecar, Sidecar]:
    """Both halves' sidecars.

    Raises:
        CheckpointError: one is refused, or they do not belong together.
    """
    av, ar = (read_sidecar(folder / half, half) for half in HALVES)
    if av.width != ar.width:
        raise CheckpointError(f"{folder}: the AV is {av.width} wide and the AR {ar.width}: they are no pair")
    layers = {side.layer for side in (av, ar)} - {None}
    blocks = _blocks(folder / "ar")
    if len(layers) > 1 or (layers and layers != {blocks - 1}):
        said = f"the sidecars say {', '.join(map(str, sorted(layers - {None}, key=str)))}"
        raise CheckpointError(f"{folder}: the AR has {blocks} blocks, which is layer {blocks - 1}, and {said}: one of them is wrong")
    return av, ar


def checked_weights(folder: Path, half: str) -> dict[str, Tensor]:
    """A half's weights.

    Raises:
        CheckpointError: they are missing or damaged, hold no or several input embeddings, or a number that is not finite.
    """
    state = read_model(folder)
    embeddings = [name for name in state if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))]
    if len(embeddings) != 1:
        raise CheckpointError(f"{folder} holds {len(embeddings)} input embeddings, and readers need exactly one: it is no {half.upper()}")
    for name, value in state.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{folder}: {name} holds numbers that are not finite; the export was damaged, fetch it anew")
    return state


def check_prompt(folder: Path, av: Sidecar, config: Config) -> None:
    """Hold the rendered prompt against the ids that the sidecar says are around the marker.

    Raises:
        CheckpointError: the marker is not one token that stands there once between those neighbours: the tokenizer is another.
    """
    assert av.marker is not None
    tokenizer = load_tokenizer(config)
    text = av.template.replace(SLOT, av.marker.text)
    rendered = chat_prompt(tokenizer, text) if config.verbalizer.chat else text
    ids = tokenizer(rendered, add_special_tokens=not config.verbalizer.chat)["input_ids"]
    places = [i for i, number in enumerate(ids) if number == av.marker.ids[0]]
    found = tuple(ids[i] for i in (places[0], places[0] - 1, places[0] + 1)) if len(places) == 1 and 0 < places[0] < len(ids) - 1 else None
    if found != av.marker.ids:
        told = f"{len(places)} times" if found is None else f"between {found[1]} and {found[2]}"
        wanted = f"once between {av.marker.ids[1]} and {av.marker.ids[2]}"
        raise CheckpointError(
            f"{folder}: the marker {av.marker.text!r} ({av.marker.ids[0]}) stands in this tokenizer's prompt {told}, not {wanted}; the "
            f"prompt's ids are {ids[:60]}; set tokenizer_name to the lens's own tokenizer"
        )


def _settings(av: Sidecar, ar: Sidecar) -> dict[str, Any]:
    """The configuration of a lens that somebody else trained."""
    assert av.marker is not None
    before, behind = ar.template.split(EXPLANATION)
    layer = av.layer if av.layer is not None else ar.layer
    values: dict[str, Any] = {"t_text": LONGEST_TEXT, "tail_order": "forward"}
    if av.base is not None:
        values["model_name"] = av.base
    if layer is None:
        raise CheckpointError("the sidecars name no layer; write extraction_layer_index into av/nla_meta.yaml")
    values["layer_l"] = layer
    values["verbalizer"] = {
        "prompt": av.template.replace(SLOT, "<act>"),
        "plain_prompt": av.template.replace(SLOT, ""),
        "chat": True,
        "marker": av.marker.text,
        "inject": "embedding",
        "inject_norm": av.scale,
        "end_token": "eos",
        "tag": "explanation",
        "trainable_prompt": False,
    }
    values["reconstructor"] = {"prompt": before, "suffix": behind, "head": "linear", "trainable_prompt": False}
    return values


def _blocks(folder: Path) -> int:
    settings = read_json(folder / "config.json")
    text = settings.get("text_config")
    inner: dict[str, Any] = text if isinstance(text, dict) else settings
    blocks = next((inner[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in inner), None)
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise CheckpointError(f"{folder / 'config.json'} names no number of blocks; fetch the checkpoint anew")
    return blocks


def _statistics(folder: Path, config: Config, width: int) -> ActivationStatistics:
    """Of the training activations: as megalens kept them, or of this configuration's training dump."""
    from megalens.data import DataError
    from megalens.data.shards import ShardReader

    path = folder / "av" / STATISTICS
    if path.is_file():
        try:
            return ActivationStatistics(**read_tensors(path))
        except TypeError:
            raise CheckpointError(f"{path} holds no statistics of activations; fetch it anew") from None
    try:
        statistics = ShardReader(config.activation_dir("train")).statistics
    except DataError as error:
        what = f"{folder} says nothing of its training activations, and figures are measured against their mean"
        raise CheckpointError(f"{what}; dump some of this subject and layer (tools/dump_acts.py): {error}") from None
    if len(statistics.mean) != width:
        raise CheckpointError(f"{folder} is {width} wide, the activations of {config.activation_dir('train')} are {len(statistics.mean)}")
    return statistics


def _head(folder: Path, width: int) -> Tensor:
    tensors = read_tensors(folder / HEAD) if (folder / HEAD).is_file() else {}
    weight = tensors.get("weight")
    if weight is None or weight.shape != (width, width):
        shape = "absent" if weight is None else list(weight.shape)
        raise CheckpointError(f"{folder / HEAD}: weight must be [{width}, {width}], and is {shape}")
    if extra := [name for name in tensors if name != "weight"]:
        raise CheckpointError(f"{folder / HEAD} holds {extra[0]} too: a head with an offset cannot be read here yet")
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"{folder / HEAD}: weight holds numbers that are not finite; the export was damaged, fetch it anew")
    return weight


def _check_subject(folder: Path, lens: ConsistencyLens, av: Sidecar, state: dict[str, Tensor]) -> None:
    """The lens speaks with the subject's vocabulary: an embedding of its own cannot be read."""
    if lens.subject.d != av.width:
        raise CheckpointError(f"{folder} is {av.width} wide, {lens.config.model_name} is {lens.subject.d} wide; set model_name to its base")
    vocabulary = lens.subject.lm.vocabulary
    name = next(name for name in state if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")))
    pairs = {name: vocabulary.in_weight, "lm_head.weight": vocabulary.out_weight}
    for key, weight in pairs.items():
        if key not in state:
            continue
        given = state[key].to(weight)
        if given.shape != weight.shape or not torch.equal(given, weight):
            what = "has another shape than" if given.shape != weight.shape else f"differs by up to {(given - weight).abs().max():.3g} from"
            raise CheckpointError(
                f"{folder}/av: {key} {what} that of {lens.config.model_name}: a verbalizer whose vocabulary was trained too, or is of "
                "another base, cannot be read here; set model_name to the base it was made from"
            )


def _weights(folder: Path, lens: ConsistencyLens, states: dict[str, dict[str, Tensor]], head_DD: Tensor) -> dict[str, Tensor]:
    """The lens's weights by their stable names, from both halves."""
    lm = lens.subject.lm
    places = {module: path for path, module in lm.model.named_modules()}
    paths, norm = [places[block] for block in lm.blocks], places[lm.norm]
    wanted = {}
    for stable, name in module_names(lens.lens_state_names()).items():
        role, part, *rest = stable.split(".")
        half = next(half for half, named in HALVES.items() if named == role)
        if part == "blocks":
            key = ".".join([paths[int(rest[0])], *rest[1:]])
        elif part == "norm":
            key = ".".join([norm, *rest])
        elif part == "head":
            wanted[stable] = head_DD
            continue
        else:
            wanted[stable] = lens.get_parameter(name).detach()  # prompts, which are token ids
            continue
        if key not in states[half]:
            raise CheckpointError(f"{folder / half} lacks the weight {key}; fetch the checkpoint anew")
        wanted[stable] = states[half][key]
    return wanted
