"""Models and tokenizers from a local folder or the hub: loaded, identified, and refused in one line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from megalens.cli import NO_MEMORY
from megalens.config import Config, ConfigError
from megalens.device import materialise, resolve_dtype
from megalens.families.causal_lm import CausalLM
from megalens.families.hub import snapshot, weight_files
from megalens.families.protocol import Settings
from megalens.families.registry import attention_of, class_of
from megalens.families.self_check import check_layout
from megalens.families.weights import WeightFiles, damage_of, find_file, no_safetensors, weight_count, wrong_shape


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The subject's tokenizer (or ``tokenizer_name``'s), tried out on a text.

    Raises:
        ConfigError: there is none, or its files are damaged.
    """
    name = config.tokenizer_name or config.model_name
    tokenizer = from_pretrained(transformers.AutoTokenizer, config, name=name)
    try:
        for special in (True, False):
            tokenizer.decode(tokenizer(["A text."], add_special_tokens=special, split_special_tokens=not special)["input_ids"][0])
    except Exception as error:  # noqa: BLE001 (its settings are whatever its files say)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"the tokenizer of {name} cannot read a text ({reason}): its files are damaged; fetch them anew") from None
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of everything that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def subject_fingerprint(config: Config) -> str:
    """A short hash of the model's settings and weights, without loading them: its config, each weight file's size, header and samples.

    Of a hub model, what is not in the cache is fetched first, so that the hash does not depend on what is.
    """
    folder = place_of(config, weights=True)
    digest = hashlib.sha256()
    for path in [folder / "config.json", *(folder / file for file in weight_files(folder) if (folder / file).exists())]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(17):
                file.seek(i * max(0, size - 65536) // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]


def place_of(config: Config, name: str | None = None, weights: bool = False) -> Path:
    """The folder of a model's files: its own, or of a hub model that of ``config.revision``, fetched where it is not cached.

    Args:
        name: another model than the subject, at its main revision.
        weights: also fetch its weights.

    Raises:
        ConfigError: it does not exist, cannot be fetched, or is a folder, which has no revisions.
    """
    name = name or config.model_name
    _check_folder(name)
    revision = config.revision if name == config.model_name else None
    if not os.path.isdir(name):
        return snapshot(name, revision, weights)
    if revision is not None:
        raise ConfigError(f"revision={revision} is for models of the hub, and model_name={name} is a folder; leave revision out")
    return Path(name)


def commit_of(config: Config) -> str | None:
    """The commit that a hub model's files are of; None: it is a local folder."""
    return None if os.path.isdir(config.model_name) else place_of(config).name


def model_settings(config: Config) -> Settings:
    """The model's settings, whatever ``layer_l`` is.

    Raises:
        ConfigError: no such model.
    """
    return from_pretrained(transformers.AutoConfig, config)


def check_model(config: Config) -> Settings:
    """The model's settings, read without its weights.

    Raises:
        ConfigError: no such model, or ``layer_l`` or one of ``activation_dumper.layers`` is not a block of it.
    """
    settings = model_settings(config)
    blocks, layers = settings.get_text_config().num_hidden_layers, config.activation_dumper.layers
    if config.layer_l >= blocks:
        raise ConfigError(f"layer_l={config.layer_l} is no block of {config.model_name}: it has {blocks}, so layer_l is 0 to {blocks - 1}")
    if max(layers, default=0) >= blocks:
        raise ConfigError(f"activation_dumper.layers={layers}: {config.model_name} has {blocks} blocks, so each is 0 to {blocks - 1}")
    return settings


def load_model(config: Config, settings: Settings) -> PreTrainedModel:
    """A model with all its weights, on the CPU.

    Args:
        settings: its configuration, of :func:`check_model`.

    Raises:
        ConfigError: its files are missing or damaged, lack a weight, or hold one of another shape.
    """
    name = config.model_name
    _check_blocks(config, settings)
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that both come back in words, not as a table
    options = model_options(config, settings) | report
    model, found = from_pretrained(class_of(settings), config, config=settings, use_safetensors=True, **options)
    if found["mismatched_keys"]:
        parameter, stored, wanted = min(found["mismatched_keys"])
        raise ConfigError(wrong_shape(name, parameter, tuple(stored), tuple(wanted)))
    if missing := found["missing_keys"]:
        first = next((key for key in model.state_dict() if key in missing), min(missing))
        count = "the weight" if len(missing) == 1 else f"{len(missing)} weights, the first of them"
        raise ConfigError(f"{name} lacks {count} {first}, where random numbers would stand; fetch the model anew")
    return model


def load_without_blocks(
    config: Config, settings: Settings, device: torch.device, upto_block: int | None = None
) -> tuple[CausalLM, WeightFiles]:
    """A model whose blocks are on the meta device, all else on ``device``; and the files that hold the blocks' weights.

    Args:
        settings: its configuration, of :func:`check_model`.
        upto_block: keep only blocks ``0 .. upto_block``, and no vocabulary head; None: all.

    Raises:
        ConfigError: the walk differs from the model's own forward (on a tiny model of these settings, since the weights are not here),
            or its files are missing, damaged or quantised.
    """
    from accelerate import init_empty_weights  # imports much, DeepSpeed among it

    if getattr(settings, "quantization_config", None):
        raise ConfigError(
            f"{config.model_name} is quantised, which engines that shard the model cannot read; name the model it was made of"
        )
    _check_blocks(config, settings)
    check_layout(settings, config.trust_remote_code)
    with init_empty_weights(include_buffers=False):
        options = model_options(config, settings)
        model = class_of(settings).from_config(settings, trust_remote_code=config.trust_remote_code, **options)
    model.tie_weights()
    lm, files = CausalLM(model), WeightFiles(str(place_of(config, weights=True)), model)
    if upto_block is not None:
        del lm.blocks[upto_block + 1 :]
        model.get_output_embeddings().weight = lm.vocabulary.out_weight = lm.vocabulary.in_weight  # nothing is said: it is not read
    in_blocks = {parameter for block in lm.blocks for parameter in block.parameters()}
    for parameter_name, parameter in model.named_parameters():
        if parameter not in in_blocks:
            materialise(parameter, files.read(parameter_name), device)
    for module in model.modules():
        module._buffers = {key: value.to(device) for key, value in module._buffers.items()}
    return lm, files


def _check_blocks(config: Config, settings: Settings) -> None:
    """Refuse a configuration of more blocks than its files can have, before they are built: each has several weights."""
    blocks, found = settings.get_text_config().num_hidden_layers, weight_count(str(place_of(config, weights=True)))
    if found is not None and blocks > found:
        raise ConfigError(
            f"{config.model_name} is damaged: {blocks} blocks by its config.json, {found} weights in its files; fetch both from one place"
        )


def model_options(config: Config, settings: Settings) -> dict[str, Any]:
    """How transformers builds the model: in which dtype, with which attention."""
    return {"dtype": getattr(torch, resolve_dtype(config)), "attn_implementation": attention_of(settings)}


def from_pretrained(factory: Any, settings: Config, name: str | None = None, **options: Any) -> Any:
    """What a class of transformers (``AutoConfig`` and its like) reads from ``name``, by default the subject.

    Raises:
        ConfigError: it cannot; the message is one line.
    """
    name = str(place_of(settings, name, weights=factory is transformers.AutoModelForCausalLM))
    try:
        with _quiet():
            return factory.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except SafetensorError as error:
        raise ConfigError(_damaged_weights(name, str(error))) from None
    except Exception as error:  # noqa: BLE001 (a folder's files can make its library raise anything; tokenizers raises Exception itself)
        raise ConfigError(_why_not(factory, name, error)) from None


def _why_not(factory, name: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    reason = (" ".join(lines) if lines[0].endswith(":") else lines[0]).removesuffix(".")
    if not isinstance(error, ImportError | OSError | RuntimeError | ValueError):
        reason = f"its files are not as {factory.__name__} reads them ({type(error).__name__}: {reason})"
    if reason.startswith("Couldn't instantiate the backend tokenizer"):
        files = "tokenizer.json, or tokenizer.model, or vocab.json and merges.txt"
        return f"{name} has no tokenizer files ({files}); copy them there, or set tokenizer_name to a model with the same tokenizer"
    if any(sign in reason for sign in NO_MEMORY):
        mend = "share it among ranks, as in torchrun --nproc_per_node 8 ... engine=fsdp (docs/large.md), or name a smaller model"
        return f"out of memory: {name} does not fit into this process ({reason}); {mend}"
    if isinstance(error, json.JSONDecodeError) and (bad := _bad_json(name)):
        return f"{bad} is no valid JSON: it is damaged or a pointer of Git LFS; fetch it anew"
    if isinstance(error, OSError) and SAFE_WEIGHTS_NAME in reason and (Path(name).is_dir() or find_file(name, WEIGHTS_NAME)):
        return no_safetensors(name)
    mend = "" if Path(name).is_dir() else f"; fetch it where there is a network (hf download {name}) or name a local folder"
    return f"cannot load {name}: {reason}{mend}"


def _damaged_weights(name: str, reason: str) -> str:
    """Name the file of weights that cannot be opened."""
    config = find_file(name, CONFIG_NAME)
    for path in sorted(Path(config).parent.glob("*.safetensors")) if config else []:
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            return damage_of(path, str(error))
    return f"cannot load {name}: its weights are damaged ({reason}); fetch them anew"


def _bad_json(name: str) -> Path | None:
    for path in sorted(Path(name).glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return path
    return None


@contextmanager
def _quiet():
    """Without transformers' progress bars and its table of weights that did not fit: what matters of it is said in one line."""
    bars, log = transformers.utils.logging, logging.getLogger("transformers.modeling_utils")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    log.addFilter(_is_no_table)
    try:
        yield
    finally:
        log.removeFilter(_is_no_table)
        if shown:
            bars.enable_progress_bar()


def _is_no_table(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)


def _check_folder(name: str) -> None:
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        maker = {"SmolLM2-135M-Instruct": "prepare_demo", "tiny-llama": "make_tiny"}.get(Path(name).name)
        raise ConfigError(f"model folder {name} does not exist" + (f"; python tools/{maker}.py makes it" if maker else "; set model_name"))
