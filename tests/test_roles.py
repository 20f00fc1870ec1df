"""What of each role is trained: rank, scale and layers of its adapters; and a started lens goes on with those that it has."""

import dataclasses

import pytest
import torch
from tiny_run import make_subject_and_dump, tiny_config

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.formats.megalens import read_weights
from megalens.config import Config, ConfigError, Lora, load_config
from megalens.families.adapters import adapter
from megalens.lens.names import stable_names
from megalens.objective import build_lens
from megalens.tiny import make_model
from megalens.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A configuration of some steps, and the checkpoint that they left."""
    folder = tmp_path_factory.mktemp("roles")
    make_subject_and_dump(folder)
    config = tiny_config(folder, "first", max_train_steps="4s")
    assert train(config) == 0
    return config, config.run_dir / "last"


def make_lens(model, *settings):
    config = load_config([f"model_name={model}", "layer_l=1", "t_text=2", "dtype=fp32", "device=cpu", "run_name=x", *settings])
    return build_lens(config, torch.zeros(64), torch.ones(64))


def adapters(lens, role):
    """Shapes of a role's adapters by their stable names behind ``<role>.adapters``."""
    names = stable_names(lens.lens_state_names())
    return {
        stable.split(".", 2)[2]: tuple(lens.get_parameter(name).shape)
        for name, stable in names.items()
        if stable.startswith(f"{role}.adapters.")
    }


def test_a_role_has_the_rank_and_layers_of_its_own_section_and_the_rest_of_lora(model):
    own = ["verbalizer.lora.r=2", "verbalizer.lora.targets=[q_proj,mlp.up_proj]", "reconstructor.lora.rslora=true"]
    lens = make_lens(model, "lora.r=4", "lora.alpha=8", "lora.targets=[v_proj]", *own)
    verbalizer, reconstructor = (adapters(lens, role) for role in ("verbalizer", "reconstructor"))
    assert {name.rpartition(".")[0] for name in verbalizer} == {
        f"{n}.{layer}" for n in (2, 3) for layer in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert {name.rpartition(".")[0] for name in reconstructor} == {f"{n}.self_attn.v_proj" for n in (0, 1)}
    assert {shape[0] for name, shape in verbalizer.items() if name.endswith(".A")} == {2}
    assert {shape[0] for name, shape in reconstructor.items() if name.endswith(".A")} == {4}
    assert lens.config.lora_of("verbalizer") == Lora(r=2, alpha=8.0, targets=["q_proj", "mlp.up_proj"])
    assert lens.config.lora_of("reconstructor") == Lora(r=4, alpha=8.0, rslora=True, targets=["v_proj"])


@pytest.mark.parametrize(("setting", "scale"), [("lora.rslora=false", 6.0 / 4), ("lora.rslora=true", 6.0 / 2)])
def test_the_update_is_alpha_over_the_rank_or_over_its_root(model, setting, scale):
    lens = make_lens(model, "lora.r=4", "lora.alpha=6", "lora.targets=[q_proj]", setting)
    layer = lens.subject.lm.blocks[2].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["verbalizer"].weight)
    x = torch.randn(3, 64)
    with adapter(lens.subject.lm, "verbalizer"):
        found = layer(x) - layer.base_layer(x)
    plain = x @ layer.lora_A["verbalizer"].weight.T @ layer.lora_B["verbalizer"].weight.T
    torch.testing.assert_close(found, scale * plain, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(model):
    with pytest.raises(ConfigError, match=r"no linear layer of the adapted blocks is called query; there are down_proj, gate_proj, k_proj"):
        make_lens(model, "verbalizer.lora.targets=[query]")
    for wrong, message in {
        "verbalizer.lora.r=0": "verbalizer.lora.r=0 must be greater than 0, or null",
        "reconstructor.lora.dropout=1.5": r"reconstructor.lora.dropout=1.5 must lie in \[0, 1\)",
        "verbalizer.lora.rank=3": "did you mean 'verbalizer.lora.r",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config([wrong])


def test_a_started_lens_goes_on_with_its_own_adapters(started):
    config, folder = started
    onward = dataclasses.replace(config, run_name="onward", init_from=str(folder), learning_rate=0.0)
    assert train(onward) == 0
    given, found = read_weights(folder), read_weights(onward.run_dir / "last")
    assert given.keys() == found.keys()
    assert all(torch.equal(given[name], found[name]) for name in given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.lora, "r", 3), r"goes on with its own adapters: set lora\.r=2 \(here it is 3\)"),
        (lambda c: setattr(c.verbalizer.lora, "r", 3), r"set verbalizer\.lora\.r=2 \(here it is 3\)"),
        (lambda c: setattr(c.reconstructor.lora, "targets", ["q_proj"]), r"set reconstructor\.lora\.targets=\[\]"),
        (lambda c: setattr(c.lora, "rslora", True), r"set lora\.rslora=False"),
        (lambda c: setattr(c.lora, "alpha", 4.0), r"set lora\.alpha=2\.0"),
        (lambda c: setattr(c.reconstructor, "mode", "full"), r"has reconstructor\.mode=lora, not full; set reconstructor\.mode=lora"),
    ],
)
def test_other_adapters_than_a_started_lens_has_are_refused_by_the_key_that_mends_it(started, change, message):
    config, folder = started
    onward = dataclasses.replace(
        config,
        run_name="refused",
        init_from=str(folder),
        lora=dataclasses.replace(config.lora),
        verbalizer=dataclasses.replace(config.verbalizer, lora=dataclasses.replace(config.verbalizer.lora)),
        reconstructor=dataclasses.replace(config.reconstructor, lora=dataclasses.replace(config.reconstructor.lora)),
    )
    change(onward)
    with pytest.raises(CheckpointError, match=message):
        train(onward)


def test_roles_without_a_section_of_their_own_are_as_lora_says():
    config = Config(lora=Lora(r=7, alpha=3.0, dropout=0.1))
    assert config.lora_of("verbalizer") == config.lora_of("reconstructor") == config.lora
