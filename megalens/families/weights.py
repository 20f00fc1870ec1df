"""A causal LM whose blocks have no weights yet, and its weights on disk one tensor at a time: how a model loads straight into shards."""

from __future__ import annotations

import json

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from megalens.config import ConfigError
from megalens.device import materialise
from megalens.families.causal_lm import CausalLM


class WeightFiles:
    """The safetensors of a model, by the model's own parameter names.

    Args:
        name: a local folder or a hub name.
        model: the model; its weights may be anywhere, or on the meta device.

    Raises:
        ConfigError: there are none.
    """

    def __init__(self, name: str, model: PreTrainedModel):
        self.name = name
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        whole = index or cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if whole is None:
            raise ConfigError(f"{name} holds no safetensors, which engines that shard the model read it from; save it anew as safetensors")
        if index:
            with open(index, encoding="utf-8") as file:
                file_of = json.load(file)["weight_map"]
        else:
            with safe_open(whole, "pt") as file:
                file_of = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        state, prefix = model.state_dict(), model.base_model_prefix
        self._place = {rename_source_key(key, renamings, [], prefix, state)[0]: (file, key) for key, file in file_of.items()}

    def read(self, parameter: str) -> Tensor:
        """A parameter's values, on the CPU, as they are stored.

        Raises:
            ConfigError: the files do not hold it.
        """
        if parameter not in self._place:
            mend = "save it anew with transformers, or train with an engine that loads the model whole (local, ZeRO 1 or 2)"
            raise ConfigError(f"the files of {self.name} hold no {parameter}; {mend}")
        file_name, key = self._place[parameter]
        with safe_open(cached_file(self.name, file_name), "pt") as file:
            return file.get_tensor(key)


def load_without_blocks(name: str, settings, device: torch.device, **options) -> tuple[CausalLM, WeightFiles]:
    """A model whose blocks are on the meta device, all else on ``device``; and the files that hold the blocks' weights.

    Args:
        settings: the model's configuration.
        options: how transformers makes a model of it.
    """
    from accelerate import init_empty_weights  # imports much, DeepSpeed among it

    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(settings, **options)
    model.tie_weights()
    lm, files = CausalLM(model), WeightFiles(name, model)
    in_blocks = {parameter for block in lm.blocks for parameter in block.parameters()}
    for parameter_name, parameter in model.named_parameters():
        if parameter not in in_blocks:
            materialise(parameter, files.read(parameter_name), device)
    for module in model.modules():
        module._buffers = {key: value.to(device) for key, value in module._buffers.items()}
    return lm, files
