"""What docs/extending.md shows works: its Python blocks are run, section by section."""

import re
from pathlib import Path

import pytest

from megalens.config import ConfigError
from megalens.families import registry
from megalens.families.causal_lm import CausalLM
from megalens.families.self_check import check_walk

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def blocks_of(section):
    """The Python blocks of a section of the page, in order."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S).group(1)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_model_family_of_the_page_is_walked_and_without_its_file_refused(monkeypatch):
    transformers_part, family_file, check = blocks_of("A model family")
    names = {}
    exec(transformers_part, names)
    registry.family_of(names["MupConfig"]())  # finds the makes, so that what is put back below has them
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    exec(family_file, names)
    exec(check, names)
    registry._families.pop("mup_llama")
    with pytest.raises(ConfigError, match=r"its own residual stream before block 0 differs by 91\.7%"):
        check_walk(CausalLM(names["model"]))
