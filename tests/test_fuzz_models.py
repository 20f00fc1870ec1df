"""A model folder of any content is loaded and read as the model itself would, or refused in a line; its files stay as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzzed import as_json, damaged, fuzzed, mutated, near, outcome, tree, values
from hypothesis import given
from hypothesis import strategies as st

from megalens.config import config_from_dict
from megalens.data.pretokenize import encode
from megalens.families.loading import check_model, load_tokenizer, subject_fingerprint, tokenizer_fingerprint
from megalens.lens.prompts import check_fits
from megalens.lens.subject import load_subject
from megalens.tiny import make_model

KINDS = ["llama", "gpt2", "gemma2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        make_model(folder / kind, kind=kind, num_hidden_layers=2, **({"layer_types": ["full_attention"] * 2} if kind == "gemma2" else {}))
    return folder


def copy(place: Path, kind: str) -> Path:
    shutil.rmtree(place / "copy", ignore_errors=True)
    return shutil.copytree(place / kind, place / "copy")


def use(folder: Path) -> None:
    """What every command does with a model: look at it, load it, read a text."""
    config = config_from_dict({"model_name": str(folder), "layer_l": 0, "device": "cpu", "dtype": "fp32", "t_text": 2})
    settings = check_model(config)
    tokenizer = load_tokenizer(config)
    check_fits(config, settings, tokenizer)
    assert len(tokenizer_fingerprint(tokenizer)) == len(subject_fingerprint(config)) == 16
    ids = encode(tokenizer, ["A text of some words, to be read."])[0][:16]
    assert ids
    subject = load_subject(config)
    assert subject.residual(torch.tensor([ids])).shape == (1, len(ids), subject.d)


@st.composite
def configs(draw, found: dict) -> dict:
    if draw(st.booleans()):
        return draw(mutated(found))
    found = dict(found)
    others = [
        "auto_map",
        "quantization_config",
        "head_dim",
        "rope_scaling",
        "sliding_window",
        "num_experts",
        "is_decoder",
        "tie_word_embeddings",
    ]
    for key in draw(st.lists(st.sampled_from([*sorted(found), *others]), min_size=1, max_size=2)):
        found[key] = draw(st.one_of(values, near(found[key]) if key in found else values, st.sampled_from([1, 2, 8, 64, 100, 10**6])))
    return found


@fuzzed(30)
@given(st.data(), st.sampled_from(KINDS))
def test_a_config_json_of_any_content_is_loaded_or_refused(place, data, kind):
    folder = copy(place, kind)
    found = data.draw(st.one_of(configs(json.loads((folder / "config.json").read_text())), values))
    (folder / "config.json").write_bytes(data.draw(st.one_of(st.just(as_json(found)), st.just(as_json(found)), damaged(as_json(found)))))
    before = tree(folder)
    outcome(lambda: use(folder))
    assert tree(folder) == before


@fuzzed(20)
@given(st.data(), st.sampled_from(["tokenizer.json", "tokenizer_config.json", "tokenizer_config.json", "generation_config.json"]))
def test_a_tokenizer_of_any_content_is_used_or_refused(place, data, name):
    folder = copy(place, "llama")
    content = (folder / name).read_bytes()
    value = json.loads(content)
    changed = data.draw(
        st.one_of(mutated(value), values).map(as_json) if name != "tokenizer.json" else st.one_of(damaged(content), values.map(as_json))
    )
    (folder / name).write_bytes(data.draw(st.one_of(st.just(changed), damaged(content))))
    before = tree(folder)
    outcome(lambda: use(folder))
    assert tree(folder) == before


@fuzzed(15)
@given(st.data())
def test_weights_of_any_bytes_are_loaded_or_refused(place, data):
    folder = copy(place, "llama")
    content = (folder / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    bad = data.draw(st.one_of(damaged(content), damaged(content[:head]).map(lambda some: some + content[head:])))
    (folder / "model.safetensors").write_bytes(bad)
    before = tree(folder)
    outcome(lambda: use(folder))
    assert tree(folder) == before
