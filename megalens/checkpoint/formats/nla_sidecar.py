"""``nla_meta.yaml``: what the other readers of natural language autoencoders know of a checkpoint's two halves.

Every spelling that is in use is read; what two keys say differently is refused. Unknown keys are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalens.checkpoint import CheckpointError
from megalens.config.yaml_core import read_yaml
from megalens.files import new_file

FILE = "nla_meta.yaml"
SLOT, EXPLANATION = "{injection_char}", "{explanation}"
_ROLES = {"av": "av", "actor": "av", "verbalizer": "av", "ar": "ar", "critic": "ar", "reconstructor": "ar"}
_SECTIONS = {"av": ("av", "actor", "verbalizer"), "ar": ("ar", "critic", "reconstructor")}
_LONGEST = 1 << 20  # bytes of a sidecar


@dataclass(frozen=True)
class Marker:
    """The token in whose place the activation goes.

    Args:
        text: one character, or an added token.
        ids: of the token, and of its neighbours to the left and to the right in the rendered prompt.
    """

    text: str
    ids: tuple[int, int, int]


@dataclass(frozen=True)
class Sidecar:
    """What one half's sidecar says.

    Args:
        role: ``av`` (verbalizer) or ``ar`` (reconstructor).
        width: of an activation.
        layer: activations are the residual after this block; None: it is not said.
        template: of the half's prompt, with :data:`SLOT` or :data:`EXPLANATION`, braces as they are to be read.
        base: the model that the halves were made from, as its maker names it.
        marker, scale: of a verbalizer.
        own: what megalens wrote for itself: the whole configuration and the subject's fingerprint.
    """

    role: str
    width: int
    layer: int | None
    template: str
    base: str | None
    marker: Marker | None = None
    scale: float | None = None
    own: Mapping[str, Any] = field(default_factory=dict)


def read_sidecar(folder: Path, role: str) -> Sidecar:
    """The sidecar of a half.

    Args:
        role: which half it must be.

    Raises:
        CheckpointError: it is missing, no YAML, of another kind or role, or a value is missing, of another type or says two things.
    """
    path = folder / FILE
    values = _read(path)
    if values.get("kind") != "nla_model":
        raise CheckpointError(f"{path}: kind is {values.get('kind')!r}, and only nla_model is a lens that enters at the embedding")
    named = values.get("role")
    if named is not None and _ROLES.get(str(named)) != role:
        raise CheckpointError(f"{path}: role is {named!r}, and this folder must hold the {role.upper()} ({' or '.join(_SECTIONS[role])})")
    template = _template(path, values, role)
    width, layer = _whole(path, values, "d_model", 1), _layer(path, values)
    base = values.get("base_checkpoint")
    if base is not None and not isinstance(base, str):
        raise CheckpointError(f"{path}: base_checkpoint must be a model's name, not {base!r}")
    kept = values.get("megalens")
    own: dict[str, Any] = kept if isinstance(kept, dict) else {}
    if role == "ar":
        return Sidecar(role, width, layer, template, base, own=own)
    scale = _get(values, "extraction.injection_scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale <= 0:
        mend = "a lens of another injection (added at a block) is not this format"
        raise CheckpointError(f"{path}: extraction.injection_scale must be a positive number, not {scale!r}; {mend}")
    return Sidecar(role, width, layer, template, base, _marker(path, values), float(scale), own)


def write_sidecar(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a sidecar as every reader takes it."""
    with new_file(folder / FILE) as file:
        file.write(yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False, width=1000).encode())


def layer_keys(layer: int) -> dict[str, Any]:
    """The layer under every key that some reader wants."""
    return {"extraction_layer_index": layer, "critic": {"extraction_layer_index": layer}}


def escaped(text: str) -> str:
    """Text as a part of a template: other readers put it through ``str.format``."""
    return text.replace("{", "{{").replace("}", "}}")


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LONGEST:
            raise CheckpointError(f"{path} has more than {_LONGEST} bytes: it is no sidecar")
        values = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there; a checkpoint of this format has one in each half") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read: {reason}; fetch it anew") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no keys: it is damaged; fetch it anew")
    return values


def _get(values: Mapping[str, Any], key: str) -> Any:
    """A value by its dotted key, or None."""
    found: Any = values
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _whole(path: Path, values: Mapping[str, Any], key: str, least: int) -> int:
    found = _get(values, key)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise CheckpointError(f"{path}: {key} must be a whole number of at least {least}, not {found!r}")
    return found


def _layer(path: Path, values: Mapping[str, Any]) -> int | None:
    sections = [f"{name}.extraction_layer_index" for name in _SECTIONS["ar"]]
    said: dict[str, int] = {}
    for key in ("extraction_layer_index", "extraction.layer_index", *sections, "layer"):
        if _get(values, key) is not None:
            said[key] = _whole(path, values, key, 0)
    for key in ("critic.num_hidden_layers", "ar.num_hidden_layers"):
        if _get(values, key) is not None:
            said[key] = _whole(path, values, key, 1) - 1
    if len(set(said.values())) > 1:
        (one, first), (other, second) = next((a, b) for a in said.items() for b in said.items() if a[1] != b[1])
        raise CheckpointError(f"{path} names two layers: {first} ({one}) and {second} ({other}); correct the wrong one")
    return next(iter(said.values()), None)


def _template(path: Path, values: Mapping[str, Any], role: str) -> str:
    named = [_get(values, f"prompt_templates.{name}") for name in _SECTIONS[role]]
    found = next((template for template in named if template is not None), None)
    slot = SLOT if role == "av" else EXPLANATION
    if not isinstance(found, str) or found.count(slot) != 1:
        keys = " or ".join(f"prompt_templates.{name}" for name in _SECTIONS[role])
        raise CheckpointError(f"{path}: {keys} must be a text that holds {slot} once")
    left, right = found.split(slot)
    return _unescaped(path, left) + slot + _unescaped(path, right)


def _unescaped(path: Path, text: str) -> str:
    bare = text.replace("{{", "").replace("}}", "")
    if "{" in bare or "}" in bare:
        raise CheckpointError(f"{path}: a brace in the prompt template is not doubled; write {{{{ for {{ and }}}} for }}")
    return text.replace("{{", "{").replace("}}", "}")


def _marker(path: Path, values: Mapping[str, Any]) -> Marker:
    text = _get(values, "tokens.injection_char")
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{path}: tokens.injection_char must be the marker's text, not {text!r}")
    names = ("injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id")
    middle, left, right = (_whole(path, values, f"tokens.{name}", 0) for name in names)
    return Marker(text, (middle, left, right))
