"""A tiny random model of the same kind as a large one: what can be checked of a model whose weights are not there to be used."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from megalens.families.protocol import Settings
from megalens.families.registry import attention_of, class_of


def tiny_copy(settings: Settings, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of the same class, made in a moment, with random weights: as few blocks as have every kind that the configuration lists (two
    at least), few heads, narrow layers.
    """
    return make(_tiny(settings), trust_remote_code)


def make(settings: Settings, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a configuration in float32, its weights drawn so that whatever is left out of it shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"dtype": torch.float32, "attn_implementation": attention_of(settings), "trust_remote_code": trust_remote_code}
        model = class_of(settings).from_config(settings, **options).eval()
        _draw_weights(model)
    return model


def _tiny(settings: Settings) -> Settings:
    """The configuration of a model of the same kind that is made in a moment."""
    config = copy.deepcopy(settings)
    text = config.get_text_config()
    _shorten(text)
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads  # rotary settings depend on it: it stays
    few_groups = min(groups, 2)
    few_heads = min(heads // groups, 2) * few_groups
    sizes = {
        "num_attention_heads": few_heads,
        "num_key_value_heads": few_groups,
        "hidden_size": few_heads * head_dim,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "n_inner": 64,
        "vocab_size": 64,
    }
    for name, size in sizes.items():
        if getattr(text, name, None):
            setattr(text, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(token := getattr(text, name, None), int):
            setattr(text, name, min(token, text.vocab_size - 1))
    return config


def _shorten(config: Settings) -> None:
    """Keep the first blocks, as many as it takes to have every mixture of the settings that are listed block by block."""
    blocks = config.num_hidden_layers
    listed = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == blocks}
    mixtures = [repr([value[i] for value in listed.values()]) for i in range(blocks)]
    few = min(blocks, max(2, 1 + max(mixtures.index(mixture) for mixture in mixtures)))
    config.num_hidden_layers = few
    for name, value in listed.items():
        setattr(config, name, value[:few])


def _draw_weights(model: nn.Module) -> None:
    """Weights that keep every layer's outputs near 1, and norms and biases off their uniform start, so that what is left out shows."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
