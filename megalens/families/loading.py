"""Models and tokenizers from a local folder or the hub: loaded, identified, and refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import transformers

from megalens.config import Config, ConfigError


def load_tokenizer(config: Config):
    """The subject's tokenizer (or ``tokenizer_name``'s)."""
    return from_pretrained(transformers.AutoTokenizer, config, name=config.tokenizer_name or config.model_name)


def tokenizer_fingerprint(tokenizer) -> str:
    """A short hash of everything that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def subject_fingerprint(config: Config) -> str:
    """A short hash of the model's settings and weights, without loading them: its config, each weight file's size, header and samples."""
    folder = _model_folder(config)
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(17):
                file.seek(i * max(0, size - 65536) // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]


def _model_folder(config: Config) -> Path:
    _check_folder(config.model_name)
    if os.path.isdir(config.model_name):
        return Path(config.model_name)
    return _fetched(config.model_name)


def _fetched(name: str) -> Path:
    """The folder of a hub model's files; those that it would be loaded from are fetched, where they are not there, and not opened."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    try:
        settings = cached_file(name, "config.json")
        whole = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if whole is None:
            get_checkpoint_shard_files(name, cached_file(name, SAFE_WEIGHTS_INDEX_NAME))
    except OSError as error:
        reason = str(error).strip().splitlines()[0].removesuffix(".")
        mend = f"fetch it where there is a network (hf download {name}) or name a local folder"
        raise ConfigError(f"cannot load {name}: {reason}; {mend}") from None
    return Path(settings).parent


def check_model(config: Config):
    """The model's settings, read without its weights.

    Raises:
        ConfigError: no such model, or ``layer_l`` or one of ``activation_dumper.layers`` is not a block of it.
    """
    settings = from_pretrained(transformers.AutoConfig, config)
    blocks, layers = settings.num_hidden_layers, config.activation_dumper.layers
    if config.layer_l >= blocks:
        raise ConfigError(f"layer_l={config.layer_l} is no block of {config.model_name}: it has {blocks}, so layer_l is 0 to {blocks - 1}")
    if max(layers, default=0) >= blocks:
        raise ConfigError(f"activation_dumper.layers={layers}: {config.model_name} has {blocks} blocks, so each is 0 to {blocks - 1}")
    return settings


def from_pretrained(factory, settings: Config, name: str | None = None, **options):
    name = name or settings.model_name
    _check_folder(name)
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # a bar over weight tensors tells a user nothing
    try:
        return factory.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        mend = "" if Path(name).is_dir() else f"; fetch it where there is a network (hf download {name}) or name a local folder"
        raise ConfigError(f"can not load {name}: {reason.removesuffix('.')}{mend}") from None
    finally:
        if shown:
            bars.enable_progress_bar()


def _check_folder(name: str) -> None:
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        maker = {"SmolLM2-135M-Instruct": "prepare_demo", "tiny-llama": "make_tiny"}.get(Path(name).name)
        raise ConfigError(f"model folder {name} does not exist" + (f"; python tools/{maker}.py makes it" if maker else "; set model_name"))
