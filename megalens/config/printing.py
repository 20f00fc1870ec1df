"""``conf/config.yaml``: the settings as a documented YAML file."""

from __future__ import annotations

import dataclasses

from omegaconf import OmegaConf

from megalens.config.fields import Weight
from megalens.config.schema import Config


def documented_yaml() -> str:
    """``conf/config.yaml``: every key with its default and what it means."""
    head = [
        "# Every setting and its default. Printed by `python -m megalens.config`; change megalens/config/, not this file.",
        "# An experiment names only what it changes, and its parents under defaults:.",
        "",
    ]
    return "\n".join(head + _document(Config(), "")) + "\n"


def _document(node, indent: str) -> list[str]:
    lines = []
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if isinstance(value, Weight) and value.type == "constant":
            value = value.value
        if dataclasses.is_dataclass(value):
            lines += ["", f"{indent}{f.name}:  # {f.metadata['help']}", *_document(value, indent + "  "), ""]
        else:
            text = (
                OmegaConf.to_yaml(OmegaConf.create({f.name: value}), resolve=False).strip()
                if not isinstance(value, list)
                else f"{f.name}: {value}"
            )
            lines.append(f"{indent}{text}  # {f.metadata['help']}")
    return [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
