"""The weights of a model on disk, one tensor at a time: how a model loads straight into shards. What is wrong with a file, in words."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from megalens.config import ConfigError


class WeightFiles:
    """The safetensors of a model, by the model's own parameter names.

    Args:
        name: a local folder or a hub name.
        model: the model; its weights may be anywhere, or on the meta device.

    Raises:
        ConfigError: there are none, or one is damaged.
    """

    def __init__(self, name: str, model: PreTrainedModel):
        self.name = name
        index = find_file(name, SAFE_WEIGHTS_INDEX_NAME)
        whole = index or find_file(name, SAFE_WEIGHTS_NAME)
        if whole is None:
            raise ConfigError(no_safetensors(name))
        if index:
            file_of = _weight_map(index)
        else:
            with _opened(whole) as file:
                file_of = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        state, prefix = model.state_dict(), model.base_model_prefix
        self._shape = {key: tuple(value.shape) for key, value in state.items()}
        self._place = {rename_source_key(key, renamings, [], prefix, state)[0]: (file, key) for key, file in file_of.items()}

    def read(self, parameter: str) -> Tensor:
        """A parameter's values, on the CPU, as they are stored.

        Raises:
            ConfigError: the files do not hold it, hold it in another shape, or are damaged.
        """
        if parameter not in self._place:
            mend = "fetch the model anew; if it is stored in a layout of its own, save it anew with transformers"
            raise ConfigError(f"the files of {self.name} hold no {parameter}; {mend}")
        file_name, key = self._place[parameter]
        path = find_file(self.name, file_name)
        if path is None:
            raise ConfigError(f"{self.name} lacks the file {file_name}, which its index names for {parameter}; fetch the model anew")
        with _opened(path) as file:
            value = file.get_tensor(key)
        if tuple(value.shape) != self._shape.get(parameter, tuple(value.shape)):
            raise ConfigError(wrong_shape(self.name, parameter, tuple(value.shape), self._shape[parameter]))
        return value


def find_file(name: str, file: str) -> str | None:
    """Where a file of a model lies; None: it has none of that name."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


def no_safetensors(name: str) -> str:
    """Why a model without safetensors is refused, and what mends it."""
    if find_file(name, WEIGHTS_NAME) is None and find_file(name, WEIGHTS_INDEX_NAME) is None:
        return f"{name} holds no safetensors, the one format weights are read from; fetch the model anew"
    folder = name if Path(name).is_dir() else Path(name).name
    load = f"M.from_pretrained('{name}', dtype='auto', use_safetensors=False)"
    command = f"python -c \"from transformers import AutoModelForCausalLM as M; {load}.save_pretrained('{folder}')\""
    place = "" if folder == name else f" and set model_name={folder}"
    return f"{name} holds {WEIGHTS_NAME} but no safetensors, the one format weights are read from; convert it{place}: {command}"


def wrong_shape(name: str, parameter: str, found: tuple, wanted: tuple) -> str:
    """Why a model with a weight of another shape than its configuration says is refused."""
    return f"{name} is damaged: {parameter} is {list(found)} in its files, {list(wanted)} by its config.json; fetch both from one place"


def damage_of(path: str | Path, reason: str) -> str:
    """What is wrong with a file of weights that cannot be read, and what mends it."""
    with open(path, "rb") as file:
        start = file.read(24)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of Git LFS, not the weights; run 'git lfs pull' in its folder, or fetch the model anew"
    return f"{path} is cut short or damaged ({reason}); fetch it anew"


@contextmanager
def _opened(path: str):
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(damage_of(path, str(error))) from None


def _weight_map(index: str) -> dict[str, str]:
    try:
        return json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ConfigError(f"{index} is no index of weights; fetch it anew") from None
