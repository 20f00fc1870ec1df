"""A lens whose blocks are still on the meta device gets, tensor by tensor, the weights of one that was loaded whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalens.config import Config, ConfigError, Lora, Reconstructor, Verbalizer
from megalens.objective import build_lens
from megalens.tiny import KINDS, make_model


def make_lens(folder, mode, empty_blocks=True):
    config = Config(
        model_name=str(folder),
        layer_l=1,
        t_text=2,
        dtype="fp32",
        device="cpu",
        verbalizer=Verbalizer(mode=mode),
        reconstructor=Reconstructor(mode=mode),
        lora=Lora(r=4),
    )
    return build_lens(config, torch.zeros(64), torch.ones(64), empty_blocks=empty_blocks)


def assert_same_values(empty, whole):
    wanted, found = dict(whole.named_parameters()), dict(empty.named_parameters())
    assert list(found) == list(wanted)
    for name, parameter in found.items():
        inside = ".layers." in name or ".h." in name or ".own." in name
        assert parameter.is_meta == inside, name
        assert torch.equal(empty.initial(name) if parameter.is_meta else parameter, wanted[name]), name
        assert parameter.requires_grad == wanted[name].requires_grad
    for (name, mine), (_, theirs) in zip(empty.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_starts_as_in_a_lens_that_was_loaded_whole(tmp_path, kind):
    folder = make_model(tmp_path / kind, kind=kind)
    for mode in ("lora", "full"):
        assert_same_values(make_lens(folder, mode), make_lens(folder, mode, empty_blocks=False))


def test_model_in_several_files_is_read_from_the_one_that_its_index_names(tmp_path):
    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    whole = make_lens(folder, "frozen", empty_blocks=False)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_values(make_lens(folder, "frozen"), whole)


def test_weights_that_are_not_there_are_named_with_the_mend(tmp_path):
    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"hold no model\.layers\.2\.mlp\.up_proj\.weight; save it anew with transformers"):
        make_lens(folder, "frozen").initial("subject.lm.model.model.layers.2.mlp.up_proj.weight")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no safetensors"):
        make_lens(folder, "frozen")
