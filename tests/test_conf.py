"""The files in conf/: all load, all are about existing keys, and none repeats a default."""

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from megalens.config import config_to_dict, load_config
from megalens.config.printing import documented_yaml

FILES = sorted((ROOT / "conf").glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request, monkeypatch):
    monkeypatch.chdir(ROOT)
    return request.param


def test_every_file_loads(file):
    assert load_config([f"config={file}"]).run_name == file.stem


def test_config_yaml_is_printed_from_the_code():
    assert (ROOT / "conf" / "config.yaml").read_text(encoding="utf-8") == documented_yaml()


def test_config_yaml_holds_the_defaults():
    assert load_config([f"config={ROOT / 'conf' / 'config.yaml'}", "run_name=x"]) == load_config(["run_name=x"])


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


ROOTS = [
    file
    for file in FILES
    if file.stem not in ("config", "simplestories_frozenl4e40p1largebatch3072") and "defaults" not in OmegaConf.load(file)
]


@pytest.mark.parametrize("root", ROOTS, ids=lambda path: path.stem)
def test_experiments_without_parents_name_only_what_they_change(root):
    """But for config.yaml, which lists everything, and the seed's experiment, which pins the seed's values."""
    defaults = dict(flat(config_to_dict(load_config(["run_name=x"]))))
    repeated = [key for key, value in flat(OmegaConf.to_container(OmegaConf.load(root))) if defaults[key] == value]
    assert repeated == []


def test_a_named_start_is_a_file_in_conf(file):
    start = load_config([f"config={file}"]).init_from
    assert start is None or (ROOT / start) in FILES


def test_the_seeds_experiment_has_the_seeds_values():
    c = load_config([f"config={ROOT / 'conf' / 'simplestories_frozenl4e40p1largebatch3072.yaml'}"])
    assert (c.model_name, c.layer_l, c.t_text) == ("SimpleStories/SimpleStories-5M", 4, 4)
    assert (c.batch_size, c.learning_rate, c.train_mode) == (3072, 1e-3, "frozen")
    assert (c.alpha_schedule.type, c.alpha_schedule.value) == ("constant", 0.1)
    tau = c.gumbel_tau_schedule
    assert (tau.type, tau.start_value, tau.end_value, tau.constant_steps_before_decay, tau.num_steps) == ("linear", 1.0, 0.1, "2e", "-1")
    assert (c.dataset.name, c.dataset.split, c.dataset.val_split, c.dataset.text_column) == (
        "SimpleStories/SimpleStories",
        "train",
        "test",
        "story",
    )
    assert c.wandb.project == "consistency-lens-simplestories"
    assert c.num_train_epochs > 2, "the temperature only falls after two epochs"


def test_the_demo_starts_from_its_warm_start_on_the_same_data():
    demo, warm = (load_config([f"config={ROOT / 'conf' / name}.yaml"]) for name in ("demo", "demo_warmstart"))
    assert demo.init_from == "conf/demo_warmstart.yaml"
    assert warm.tail_say_weight
    assert warm.tail_read_weight
    same = [
        "model_name",
        "layer_l",
        "t_text",
        "tail_order",
        "train_mode",
        "lora",
        "verbalizer",
        "reconstructor",
        "dataset",
        "activation_dumper",
    ]
    assert [getattr(demo, key) for key in same] == [getattr(warm, key) for key in same]
