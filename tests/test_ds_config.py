"""A DeepSpeed file of any shape: made whole, or refused with all that is wrong with it, before a model loads."""

import json
import random
from pathlib import Path

import pytest

from megalens.config import Config
from megalens.engine import EngineError, ds_config, ds_schema

ROOT = Path(__file__).resolve().parents[1]
# As the trainers of the public write it: whatever can be "auto" is, and what is off stands there all the same.
PUBLIC = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True, "nvme_path": "auto"},
        "offload_param": {"device": "auto", "pin_memory": True},
        "overlap_comm": "auto",
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "communication_data_type": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "wandb": {"enabled": False},
}


def ds_file(tmp_path, text: dict | str | bytes, **settings) -> Config:
    path = tmp_path / "z.json"
    text = json.dumps(text) if isinstance(text, dict) else text
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    default = {"batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 0.1, "grad_clip": 0.5, "dtype": "fp32", "device": "cpu"}
    return Config(deepspeed=str(path), **default | settings)


def complaints(tmp_path, text: dict | str | bytes, ranks: int = 2, **settings) -> list[str]:
    with pytest.raises(EngineError) as caught:
        ds_config.resolve(ds_file(tmp_path, text, **settings), ranks)
    assert str(caught.value).splitlines() == list(caught.value.complaints)
    assert all("z.json: " in line for line in caught.value.complaints)
    return [line.partition("z.json: ")[2] for line in caught.value.complaints]


def test_auto_is_what_the_configuration_says():
    file = str(ROOT / "ds_configs" / "z3.json")
    config = Config(deepspeed=file, batch_size=8, gradient_accumulation_steps=2, learning_rate=0.1, dtype="bf16")
    resolved = ds_config.resolve(config, 4)
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (16, 2, 2)
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "optimizer" not in resolved, "the engine makes it"
    assert resolved["gradient_clipping"] == 1.0


@pytest.mark.parametrize("name", ["z1", "z2", "z3", "z3_offload"])
def test_every_file_of_ds_configs_resolves(name):
    config = Config(deepspeed=str(ROOT / "ds_configs" / f"{name}.json"))
    resolved = ds_config.resolve(config, 2)
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["zero_optimization"]["stage"] == ds_config.zero_stage(config) == int(name[1])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_file_of_the_public_is_taken_and_its_other_autos_are_defaults(tmp_path, dtype):
    resolved = ds_config.resolve(ds_file(tmp_path, PUBLIC, dtype=dtype), 2)
    assert resolved["bf16"] == {"enabled": dtype == "bf16"}
    assert '"auto"' not in json.dumps(resolved)
    assert "fp16" not in resolved
    assert resolved["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"pin_memory": True},
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
    }


@pytest.mark.parametrize(
    "text",
    [
        {"bf16": None},
        {"fp16": None},
        {"fp16": False},
        {"data_types": None},
        {"optimizer": None},
        {"optimizer": {"type": "AdamW", "params": None}},
        {"scheduler": None},
        {"zero_optimization": None},
        {"zero_optimization": {"stage": 3, "offload_param": None}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": None}}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}},
        {"optimizer": {"type": "AdamW", "params": {"eps": 1e-8, "torch_adam": True}}},
        {"elasticity": {"enabled": False}, "sequence_parallel_size": 1, "sparse_gradients": False},
        {"_comment": "ours", "zero_force_ds_cpu_optimizer": False},
        '\ufeff{"zero_optimization": {"stage": 1}}',
    ],
)
def test_what_is_off_or_null_is_left_out(tmp_path, text):
    resolved = ds_config.resolve(ds_file(tmp_path, text), 2)
    assert resolved["bf16"] == {"enabled": False}
    assert not {"fp16", "scheduler", "optimizer", "elasticity"} & resolved.keys()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ({"bf16": True}, 'bf16=true must be a section, e.g. {"enabled": "auto"}; or leave it out'),
        ({"fp16": True}, "take out the section fp16; the setting is dtype (bf16 or fp32)"),
        ({"fp16": {"enabled": True}}, "take out the section fp16; the setting is dtype (bf16 or fp32)"),
        ({"amp": True}, "take out the section amp; the setting is dtype (bf16 or fp32)"),
        ({"scheduler": {"type": "WarmupLR"}}, "take out the section scheduler; the setting is lr_scheduler"),
        ({"zero_optimization": True}, 'zero_optimization=true must be a section, e.g. {"stage": 2}; or leave it out'),
        ({"zero_optimization": 3}, 'zero_optimization=3 must be a section, e.g. {"stage": 2}; or leave it out'),
        ({"zero_optimization": "auto"}, 'zero_optimization="auto" must be 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage="3" must be 0, 1, 2 or 3, without quotes'),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage="auto" must be 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4 must be 0, 1, 2 or 3"),
        (
            {"optimizer": "AdamW"},
            'optimizer="AdamW" must be a section, e.g. {"type": "auto", "params": {"lr": "auto"}}; or leave it out',
        ),
        ({"optimizer": {"params": [1]}}, 'optimizer.params=[1] must be a section, e.g. {"lr": "auto"}; or leave it out'),
        (
            {"optimizer": {"type": "Adam"}},
            'optimizer.type="Adam" contradicts optimizer=adamw ("AdamW"); write "auto" there, or change the setting',
        ),
        (
            {"optimizer": {"params": {"lr": 1}}},
            'optimizer.params.lr=1 contradicts learning_rate (0.1); write "auto" there, or change the setting',
        ),
        ({"optimizer": {"params": {"eps": 1e-6}}}, "optimizer.params.eps=1e-06 cannot be had, only 1e-08; leave it out"),
        ({"optimizer": {"params": {"foo": 1}}}, "optimizer.params.foo=1 is not taken from here; leave it out"),
        ({"gradient_clipping": 0.25}, 'gradient_clipping=0.25 contradicts grad_clip (0.5); write "auto" there, or change the setting'),
        ({"gradient_accumulation_steps": "2"}, None),
        ({"train_batch_size": 8}, None),
        ({"bf16": {"enabled": True}}, 'bf16.enabled=true contradicts dtype=fp32 (false); write "auto" there, or change the setting'),
        ({"communication_data_type": "fp64x"}, 'communication_data_type="fp64x" must be one of: fp32, bf16, fp16'),
        (
            {"gradient_cliping": 1.0},
            "gradient_cliping=1.0 is no key of DeepSpeed's that megalens knows; leave it out (did you mean gradient_clipping?)",
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, None),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, None),
        (
            {"zero_optimization": {"stage": 2, "mics_shard_size": 2}},
            "zero_optimization.mics_shard_size is no key of this DeepSpeed's; leave it out",
        ),
        ({"zero_optimization": {"stage": 1, "foo": 2}}, "zero_optimization.foo is no key of this DeepSpeed's; leave it out"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
            "zero_optimization.reduce_bucket_size=0: DeepSpeed says: Input should be greater than 0",
        ),
        ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 15099494.4}}, None),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": True}}, None),
        ({"aio": {"block_size": 1}, "flops_profiler": 3}, None),
        ({"checkpoint": {"tag_validation": "perhaps"}}, None),
        ("{", None),
        ("[1]", None),
        ("[" * 100000, None),
        ('{"bf16": NaN}', None),
        ('{"bf16": {}, "bf16": {}}', "the key bf16 stands there twice in one section; take one out"),
        ('{"bf16": {}}'.encode("utf-16"), "is written in UTF-16; save it as UTF-8"),
        (
            "compute_environment: LOCAL_MACHINE\ndeepspeed_config:\n  zero_stage: 3\n",
            "is a configuration of Accelerate (YAML), not DeepSpeed's own JSON; ds_configs/z3.json is the like",
        ),
        ("zero_optimization:\n  stage: 2\n", "is YAML; DeepSpeed's file is JSON, see ds_configs/z2.json"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path, text, complaint):
    found = complaints(tmp_path, text)
    assert len(found) == 1
    assert complaint in (None, found[0])


def test_all_complaints_come_at_once(tmp_path):
    text = PUBLIC | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, "train_batch_size": 7, "amp": True}
    text["zero_optimization"] = {"stage": 2, "foo": 1, "reduce_bucket_size": 0, "offload_optimizer": {"device": "tape"}}
    found = complaints(tmp_path, text)
    places = ["section amp", "section scheduler", "train_batch_size", "reduce_bucket_size", "offload_optimizer.device", ".foo"]
    assert [sum(place in line for line in found) for place in places] == [1] * 6
    assert len(found) == 6


def any_file(draw: random.Random) -> dict:
    """A file of known and unknown keys that hold anything."""
    values = [
        None,
        True,
        0,
        1,
        3,
        -1,
        1.5,
        10**400,
        "auto",
        "x",
        [],
        [1],
        {},
        {"enabled": True},
        {"enabled": "x"},
        {"stage": 2},
        {"type": 3},
    ]
    outer = [
        place for place in (*ds_schema.SECTIONS, *ds_schema.FLAGS, *ds_schema.INSTEAD, *ds_schema.DECIDED, "other") if "." not in place
    ]
    zero = ["stage", "offload_param", "offload_optimizer", "reduce_bucket_size", "leaf_module", "cpu_offload", "zenflow", "other"]
    text = {name: draw.choice(values) for name in draw.sample(sorted(outer), draw.randrange(3))}
    text["zero_optimization"] = {name: draw.choice(values) for name in draw.sample(zero, draw.randrange(3))}
    params = {name: draw.choice(values) for name in draw.sample(["lr", "betas", "eps", "torch_adam", "other"], 2)}
    return text | {"optimizer": {"type": draw.choice(values), "params": params}} if draw.random() < 0.5 else text


def test_any_file_is_taken_or_refused_in_lines(tmp_path):
    draw, outcomes = random.Random(0), set()
    for _ in range(300):
        try:
            ds_config.resolve(ds_file(tmp_path, any_file(draw)), 2)
            outcomes.add("taken")
        except EngineError as error:
            assert all(line.startswith(f"{tmp_path / 'z.json'}: ") for line in str(error).splitlines())
            outcomes.add("refused")
    assert outcomes == {"taken", "refused"}


def test_equal_value_is_no_contradiction(tmp_path):
    config = ds_file(
        tmp_path, {"gradient_clipping": 0.5, "train_batch_size": 16, "optimizer": {"params": {"betas": [0.9, 0.999]}}}, betas=[0.9, 0.999]
    )
    assert ds_config.resolve(config, 2)["gradient_clipping"] == 0.5


def test_nvme_is_refused_where_its_operations_cannot_be_built(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    text = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    (only,) = complaints(tmp_path, text)
    assert only.startswith("offload_param to nvme needs DeepSpeed's async_io, which cannot be built here; install libaio-dev")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    assert ds_config.resolve(ds_file(tmp_path, text), 2)["zero_optimization"]["offload_param"]["device"] == "nvme"


def test_a_missing_file_names_those_that_are_there():
    with pytest.raises(EngineError, match=r"z9.json does not exist; there are: .*z3_offload.json"):
        ds_config.resolve(Config(deepspeed=str(ROOT / "ds_configs" / "z9.json")), 1)
