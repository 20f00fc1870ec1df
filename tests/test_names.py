"""A lens' parameters have names of our own that tell the role, the part and the block, whatever the subject's family calls its modules."""

import re

import pytest
import torch

from megalens.config import config_from_dict
from megalens.lens.names import GROUPS, group_of, module_names, stable_name, stable_names
from megalens.objective import build_lens
from megalens.tiny import make_model

MODES = {
    "frozen": {"train_mode": "frozen"},
    "lora": {"train_mode": "lora"},
    "full": {"train_mode": "full"},
    "mixed": {"train_mode": "lora", "reconstructor": {"mode": "full"}},
    "adapters everywhere": {"train_mode": "lora", "verbalizer": {"inject": "embedding"}},
}
PARTS = {
    "frozen": {"projection", "head", "prompt"},
    "lora": {"projection", "head", "prompt", "adapters"},
    "full": {"projection", "head", "prompt", "blocks"},
    "mixed": {"projection", "head", "prompt", "adapters", "blocks"},
    "adapters everywhere": {"projection", "head", "prompt", "adapters"},
}
STABLE = re.compile(
    r"verbalizer\.(prompt|projection\.(weight|bias)|norm\.(weight|bias)|adapters\.[23]\.[a-z_.\d]+\.[AB]|blocks\.[23]\.[a-z_.\d]+)"
    r"|reconstructor\.(prompt|suffix|head\.(weight|bias)|adapters\.[01]\.[a-z_.\d]+\.[AB]|blocks\.[01]\.[a-z_.\d]+)"
)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp(request.param), kind=request.param)


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_has_a_stable_name_and_the_way_back_is_the_same(model, mode):
    settings = {"model_name": str(model), "layer_l": 1, "t_text": 2, "dtype": "fp32", "device": "cpu", "run_name": "x", "lora": {"r": 1}}
    roles = {"reconstructor": {"suffix": " so"} | MODES[mode].get("reconstructor", {})}
    lens = build_lens(config_from_dict(settings | MODES[mode] | roles), torch.zeros(64), torch.ones(64))
    names = lens.lens_state_names()
    stable, back = stable_names(names), module_names(names)
    assert [back[stable[name]] for name in names] == names
    for name in stable.values():
        assert STABLE.fullmatch(name) or (mode == "adapters everywhere" and re.match(r"verbalizer\.adapters\.[0123]\.", name)), name
        assert "lora" not in name
        assert "base_layer" not in name
    groups = {group_of(name) for name in stable.values()}
    assert groups <= set(GROUPS)
    assert {group.split(".")[1] for group in groups} == PARTS[mode]


def test_block_number_and_path_do_not_hang_on_where_a_family_keeps_its_blocks():
    for blocks in ("model.layers", "transformer.h", "gpt_neox.layers", "model.language_model.layers"):
        name = f"subject.lm.model.{blocks}.12.mlp.experts.3.up_proj.lora_A.verbalizer.weight"
        assert stable_name(name) == "verbalizer.adapters.12.mlp.experts.3.up_proj.A"


def test_layer_that_carries_adapters_keeps_its_name():
    assert stable_name("reconstructor.own.0.mlp.up_proj.base_layer.weight") == stable_name("reconstructor.own.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="one name"):
        stable_names(["reconstructor.own.0.mlp.up_proj.base_layer.weight", "reconstructor.own.0.mlp.up_proj.weight"])


def test_norm_counts_as_blocks_and_suffix_as_prompt():
    assert group_of("verbalizer.norm.weight") == "verbalizer.blocks"
    assert group_of("reconstructor.suffix") == "reconstructor.prompt"


@pytest.mark.parametrize("name", ["subject.lm.model.model.layers.0.mlp.up_proj.weight", "verbalizer.prompt", "head.linear.weight"])
def test_what_is_no_parameter_of_a_lens_is_refused(name):
    with pytest.raises(ValueError, match=f"{re.escape(name)} is no parameter of a lens"):
        stable_name(name)
    with pytest.raises(ValueError, match="lm.head.weight is no parameter of a lens"):
        group_of("lm.head.weight")
