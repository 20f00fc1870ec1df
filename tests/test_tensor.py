"""Blocks in slices on several ranks are trained, saved and decoded as whole ones."""

import json
import sys

import pytest
import tensor_ranks
from launched import ROOT, run_ranks
from safetensors.torch import load_file

from megalens.config import Config, ConfigError, config_from_dict
from megalens.engine.state import OptimizerState
from megalens.lens.subject import load_subject
from megalens.tiny import make_model


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """A folder with models, and what four ranks saw of them."""
    folder = tmp_path_factory.mktemp("sliced")
    for kind in tensor_ranks.CASES:
        make_model(folder / kind, kind)
    run_ranks(ROOT, 4, [sys.executable, "tests/tensor_ranks.py", folder], PYTHONPATH=f"{ROOT}:{ROOT / 'benchmarks'}")
    return folder


@pytest.mark.parametrize("kind", tensor_ranks.CASES)
def test_sliced_lens_is_trained_as_by_one_process_and_goes_on_there(sliced, kind):
    seen = json.loads((sliced / f"{kind}-saved" / "seen.json").read_text())
    lens, engine = tensor_ranks.build(sliced, kind)
    batches = tensor_ranks.batches()
    for update, (batch, theirs) in enumerate(zip(batches[: tensor_ranks.STEPS], seen["metrics"], strict=False)):
        assert theirs == pytest.approx(engine.train_step([batch], tensor_ranks.at(engine, update)), rel=1e-5)
    assert seen["skipped"] == 1
    saved = load_file(sliced / f"{kind}-saved" / "lens.safetensors")
    for name, value in engine.full_state(lens.lens_state_names()).items():
        assert (saved[name] - value).norm() <= 1e-3 * value.norm(), name  # AdamW's first steps divide what is next to nothing by itself
    assert lens.verbalize(batches[0]["activation"][:2]).tolist() == seen["texts"]

    engine.load_state(OptimizerState(sliced / f"{kind}-saved"))
    assert seen["metrics"][-1] == pytest.approx(engine.train_step([batches[-1]], tensor_ranks.at(engine, tensor_ranks.STEPS)), rel=1e-5)


@pytest.mark.parametrize("kind", tensor_ranks.CASES)
def test_sharded_model_is_held_against_its_own_forward_on_its_real_weights(sliced, kind):
    refused = json.loads((sliced / f"{kind}-saved" / "seen.json").read_text())["refused"]
    by = "8.9" if kind == "gemma2" else "10.0"  # soft-capped logits
    assert f"its own logits differ by {by}% from those computed from its final norm and vocabulary matrix" in refused


def test_decode_gathers_no_block_where_nodes_hold_copies(sliced):
    """A block sums twice, twice more where it is adapted (the upper two); the slot enters at the third, prompt and tokens at the first."""
    seen = json.loads((sliced / "gpt_neox-saved" / "seen.json").read_text())
    whole, upper = 2 * 2 + 2 * 4, 2 * 4
    assert seen["decode"] == {"all_reduce": whole + upper + 2 * whole}
    assert "all_gather" in json.loads((sliced / "llama-saved" / "seen.json").read_text())["decode"]


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_backward_sums_no_more_often_than_forward(sliced, kind):
    """Queries, keys and values read one input, and so do an MLP's first layers: their gradient is summed once."""
    forward, backward = json.loads((sliced / f"{kind}-saved" / "seen.json").read_text())["sums"]
    assert 0 < backward <= forward


def test_model_that_cannot_be_sliced_is_refused(tmp_path):
    for kind, message in {
        "gpt2": "models of type 'gpt2' cannot be sliced",
        "llama": "must divide the model's 4 .* and 2 key-value heads",
    }.items():
        config = Config(model_name=str(make_model(tmp_path / kind, kind)), layer_l=1, device="cpu")
        with pytest.raises(ConfigError, match=message):
            load_subject(config).lm.slicing(4)


def test_plan_that_leaves_a_layer_whole_beside_sliced_ones_is_refused(tmp_path):
    lm = load_subject(Config(model_name=str(make_model(tmp_path / "llama")), layer_l=1, device="cpu")).lm
    assert set(lm.slicing(2).values()) == {"colwise", "rowwise"}
    lm.config.base_model_tp_plan = {path: kind for path, kind in lm.config.base_model_tp_plan.items() if not path.endswith("up_proj")}
    with pytest.raises(ConfigError, match="models of type 'llama' cannot be sliced"):
        lm.slicing(2)


def test_slices_are_for_fsdp_and_not_compiled():
    for keys, message in [({}, "needs engine=fsdp"), ({"engine": "fsdp", "compile": True}, "cannot be compiled")]:
        with pytest.raises(ConfigError, match=message):
            config_from_dict({"fsdp": {"tensor_ranks": 2}, **keys})
