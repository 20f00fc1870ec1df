"""What docs/extending.md shows works: its Python blocks are run, section by section."""

import re
from pathlib import Path

import pytest
import torch
from dumps import header, make_rows
from test_lens import make_batch, make_lens

from megalens.config import ConfigError, load_config
from megalens.data.encoding import ENCODINGS
from megalens.data.shards import ShardReader, ShardWriter
from megalens.families import registry
from megalens.families.causal_lm import CausalLM
from megalens.families.self_check import check_walk
from megalens.objective import TERMS, Step
from megalens.tiny import make_model

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


def test_objective_term_of_the_page_trains(tmp_path, monkeypatch):
    names = {}
    exec(blocks_of("An objective term")[0], names)
    monkeypatch.setattr("megalens.objective.TERMS", [*TERMS, names["Norms"]])
    lens = make_lens(str(make_model(tmp_path / "llama")), mse_weight=0.0, terms={"norms": 0.5})
    out = lens(make_batch(), Step.fixed(lens.config))
    out["loss"].backward()
    torch.testing.assert_close(out["loss"].detach(), 0.5 * out["norms"])
    assert lens.verbalizer.projection.linear.weight.grad.abs().sum() > 0
    for command in re.findall(r"train\.py config=conf/tiny\.yaml (terms.*)", PAGE.read_text(encoding="utf-8")):
        assert load_config(command.split()).terms["norms"].ends[-1] == 0.1


def test_shard_encoding_of_the_page_keeps_activations(tmp_path, monkeypatch):
    names = {}
    exec(blocks_of("A shard encoding")[0], names)
    monkeypatch.setitem(ENCODINGS, "fp16", names["Fp16"]())
    rows = make_rows(30)
    writer = ShardWriter(tmp_path, header(30) | {"encoding": "fp16"})
    writer.begin()
    writer.write(0, rows)
    assert writer.finish()
    read = ShardReader(tmp_path).read_batch(0)["activation"]
    assert read.dtype == torch.float16
    assert torch.equal(read, rows["activation"][: len(read)].half())
