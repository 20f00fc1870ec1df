"""The weights of a model on disk, one tensor at a time: how a model loads straight into shards. What is wrong with a file, in words."""

from __future__ import annotations

import json
import re
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
        ConfigError: there are none, one is damaged, or they lack a parameter.
    """

    def __init__(self, name: str, model: PreTrainedModel):
        self.name = name
        file_of = _places(name)
        if file_of is None:
            raise ConfigError(no_safetensors(name))
        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        state, prefix = model.state_dict(), model.base_model_prefix
        self._shape = {key: tuple(value.shape) for key, value in state.items()}
        self._place = {rename_source_key(key, renamings, [], prefix, state)[0]: (file, key) for key, file in file_of.items()}
        if changed := converted(model):
            mend = "it is joined or turned as it is loaded, which only engines do that load the model whole (local, ZeRO 1 and 2)"
            raise ConfigError(f"the files of {name} hold no {changed[0]}: {mend}")
        missing = next((parameter for parameter, _ in model.named_parameters() if parameter not in self._place), None)
        if missing:
            raise ConfigError(f"the files of {name} hold no {missing}: fetch the model anew")

    def read(self, parameter: str) -> Tensor:
        """A parameter's values, on the CPU, as they are stored.

        Raises:
            ConfigError: the files hold it in another shape, or are damaged.
        """
        file_name, key = self._place[parameter]
        path = find_file(self.name, file_name)
        if path is None:
            raise ConfigError(f"{self.name} lacks the file {file_name}, which its index names for {parameter}; fetch the model anew")
        with _opened(path) as file:
            value = file.get_tensor(key)
        if tuple(value.shape) != self._shape[parameter]:
            raise ConfigError(wrong_shape(self.name, parameter, tuple(value.shape), self._shape[parameter]))
        return value


def weight_count(name: str) -> int | None:
    """How many weights a model's safetensors hold; None: it has none.

    Raises:
        ConfigError: they are damaged.
    """
    places = _places(name)
    return None if places is None else len(places)


def _places(name: str) -> dict[str, str] | None:
    """The file of each weight; None: there are no safetensors."""
    if index := find_file(name, SAFE_WEIGHTS_INDEX_NAME):
        return _weight_map(index)
    whole = find_file(name, SAFE_WEIGHTS_NAME)
    if whole is None:
        return None
    with _opened(whole) as file:
        return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)


def converted(model: PreTrainedModel) -> list[str]:
    """Names of parameters that lie in no file as the model has them: transformers joins them of several, or turns them, as it loads."""
    entries = [entry for entry in get_model_conversion_mapping(model) if not isinstance(entry, WeightRenaming)]
    patterns = [re.compile(pattern.replace("*", "[^.]+")) for entry in entries for pattern in entry.target_patterns]
    return [name for name, _ in model.named_parameters() if any(pattern.search(name) for pattern in patterns)]


def find_file(name: str, file: str) -> str | None:
    """Where a file of a model lies; None: it has none of that name."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)


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
        found = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {str(key): found[key] for key in found if Path(found[key]).name == found[key]}
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{index} is no valid JSON: it is damaged or a pointer of Git LFS; fetch it anew") from None
    except (KeyError, TypeError):
        raise ConfigError(f"{index} is no index of weights; fetch it anew") from None
