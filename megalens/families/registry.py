"""Which make a model is of, by the ``model_type`` of its configuration."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

import transformers

from megalens.families import makes
from megalens.families.protocol import Family, Settings

WRAPPERS = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
"""Models that read images too, around a language model: those that transformers does not count as causal language models."""
_families: dict[str, type[Family]] = {}


def register(*model_types: str) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: models of these types are of the decorated make.

    Raises:
        ValueError: one of the types has a make already.
    """

    def add(family: type[Family]) -> type[Family]:
        taken = [name for name in model_types if name in _families]
        if taken:
            raise ValueError(f"model type '{taken[0]}' is registered already, as {_families[taken[0]].__name__}")
        _families.update(dict.fromkeys(model_types, family))
        return family

    return add


def family_of(config: Settings) -> type[Family]:
    """The make of models with a transformers configuration; types that nobody registered are taken for Llama's kin.

    Whether that is true, the check at load decides (:mod:`megalens.families.self_check`).
    """
    _find_makes()
    return _families.get(config.get_text_config().model_type, Family)


def attention_of(config: Settings) -> str | None:
    """The attention function to build a model of this configuration with, transformers' ``attn_implementation``."""
    return family_of(config).attention(config.get_text_config())


def class_of(config: Settings) -> Any:
    """The class of transformers by which a model of this configuration is made: a language model, or one that reads images too."""
    if type(config) in transformers.AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM
    wrappers = transformers.AutoModelForImageTextToText
    return wrappers if type(config) in wrappers._model_mapping else transformers.AutoModelForCausalLM


@cache
def _find_makes() -> None:
    """Import every file of ``makes/``: each registers itself."""
    for module in pkgutil.iter_modules(makes.__path__, f"{makes.__name__}."):
        importlib.import_module(module.name)
