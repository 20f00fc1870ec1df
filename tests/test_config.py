"""Settings: what is accepted, how it is merged, and the one line that meets each mistake."""

import dataclasses
import re

import pytest

from megalens.config import Config, ConfigError, Schedule, config_from_dict, config_to_yaml, load_config
from megalens.training.start import _settings_of


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return f"config={path}"


def all_fields(cls=Config, prefix=""):
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        yield prefix + field.name, field
        if dataclasses.is_dataclass(default):
            yield from all_fields(type(default), f"{prefix}{field.name}.")


# ------------------------------------------------------------------------------------------------------- what is accepted


def test_every_key_is_documented():
    undocumented = [key for key, field in all_fields() if not field.metadata["help"].strip()]
    assert undocumented == []


@pytest.mark.parametrize("argument", ["learning_rate=1e-4", "--learning_rate=1e-4"])
def test_key_value_works_with_and_without_dashes(argument):
    assert load_config([argument]).learning_rate == 1e-4


def test_the_last_of_two_values_wins():
    assert load_config(["t_text=3", "t_text=5"]).t_text == 5


def test_an_argument_overrides_the_file_wherever_it_stands(tmp_path):
    file = write(tmp_path / "a.yaml", "t_text: 3")
    assert load_config(["t_text=5", file]).t_text == load_config([file, "t_text=5"]).t_text == 5


@pytest.mark.parametrize("arguments", [["--deepspeed", "z3.json"], ["--deepspeed=z3.json"], ["deepspeed=z3.json"]])
def test_deepspeed_file_in_every_form(arguments):
    assert load_config(arguments).deepspeed == "z3.json"


def test_what_launchers_add_is_ignored():
    assert load_config(["--local_rank=1"]) == load_config([])


@pytest.mark.parametrize("text", ["001", "true", "on", "1e3", "a=b", "key: value", "[x]", "null_model"])
def test_text_is_taken_as_it_stands(text):
    assert load_config([f"run_name={text}"]).run_name == text


def test_a_prompt_may_end_in_a_colon():
    assert load_config(["verbalizer.prompt=It says <act>:"]).verbalizer.prompt == "It says <act>:"


def test_null_is_nothing_where_nothing_is_allowed():
    assert load_config(["max_train_steps=5s", "max_train_steps=null"]).max_train_steps is None


def test_durations_may_be_plain_numbers(tmp_path):
    assert load_config([write(tmp_path / "a.yaml", "max_train_steps: 500")]).max_train_steps == "500"


def test_lists_and_truths():
    config = load_config(["betas=[0.8,0.9]", "force_redump=true"])
    assert config.betas == [0.8, 0.9]
    assert config.force_redump is True


def test_verbalizer_and_reconstructor_follow_train_mode_unless_set():
    config = load_config(["train_mode=full", "reconstructor.mode=frozen"])
    assert (config.mode_of("verbalizer"), config.mode_of("reconstructor")) == ("full", "frozen")
    older = load_config(["train_mode=full", "verbalizer.mode=${train_mode}"])  # as settings files of before may say it
    assert older.mode_of("verbalizer") == "full"


def test_a_configuration_made_in_python_follows_train_mode_too():
    config = Config(train_mode="lora")
    assert (config.mode_of("verbalizer"), config.mode_of("reconstructor")) == ("lora", "lora")
    assert _settings_of(config)["verbalizer.mode"] == "lora"  # as runs of before have written it


def test_a_run_is_named_after_its_file_unless_named(tmp_path):
    file = write(tmp_path / "my_run.yaml", "t_text: 3")
    assert load_config([file]).run_dir.name == "my_run"
    assert load_config([file, "run_name=other"]).run_dir.name == "other"


def test_defaults_come_before_the_file_and_in_their_order(tmp_path):
    write(tmp_path / "grand.yaml", "t_text: 2\nseed: 2\nlayer_l: 2")
    write(tmp_path / "one.yaml", "defaults: [grand]\nt_text: 3\nseed: 3")
    write(tmp_path / "two.yaml", "seed: 4")
    config = load_config([write(tmp_path / "child.yaml", "defaults: [one, two, _self_]\ndataset:\n  min_words: 7")])
    assert (config.layer_l, config.t_text, config.seed, config.dataset.min_words) == (2, 3, 4, 7)
    assert config.run_dir.name == "child"


def test_defaults_change_only_what_they_name_in_a_section(tmp_path):
    write(tmp_path / "parent.yaml", "lora:\n  r: 4")
    config = load_config([write(tmp_path / "child.yaml", "defaults: [parent]\nlora:\n  dropout: 0.5")])
    assert (config.lora.r, config.lora.dropout, config.lora.alpha) == (4, 0.5, Config().lora.alpha)


def test_a_configuration_survives_yaml_and_dictionary(tmp_path):
    config = load_config(["betas=[0.8,0.9]", "run_name=007", "gumbel_tau_schedule.num_steps=2e", "verbalizer.prompt=a: <act>"])
    assert load_config([write(tmp_path / "saved.yaml", config_to_yaml(config))]) == config
    assert config_from_dict(dataclasses.asdict(config)) == config


def test_two_configurations_share_no_section():
    one, other = load_config([]), load_config([])
    one.lora.r, one.betas[0] = 1, 0.1
    assert (other.lora.r, other.betas[0]) != (1, 0.1)


# ---------------------------------------------------------------------------------------------------------- folder names


def test_folders_are_named_after_model_layer_and_dataset():
    config = load_config(["model_name=org/model-5M", "layer_l=4", "dataset.name=org/text", "dataset.config_name=en"])
    assert str(config.activation_dir("val")) == "data/activations/org__model-5M/layer_4/org__text_en_val"
    assert str(config.pretokenized_dir) == "data/pretokenized/org__text_en/org__model-5M"


# ------------------------------------------------------------------------------------------------- what is refused, and how

REFUSED = {
    "learning_rat=1": r"unknown key 'learning_rat' .*did you mean 'learning_rate'\?",
    "lr=1e-3": r"unknown key 'lr' .*did you mean 'learning_rate'\?",
    "seq_len=64": r"unknown key 'seq_len' .*did you mean 'activation_dumper.seq_len'\?",
    "gumbel_tau_schedule.end=1": r"did you mean 'gumbel_tau_schedule.end_value'\?",
    "xyzzy=1": r"unknown key 'xyzzy' .*conf/config.yaml lists every key",
    "=3": "unknown key ''",
    "learning_rate=": "learning_rate= is empty",
    "--dataset.name=": "dataset.name= is empty",
    "learning_rate": "'learning_rate' has no value; write learning_rate=VALUE",
    "conf/tiny.yaml": "'conf/tiny.yaml' is no setting; write key=value",
    "--deepspeed": "--deepspeed wants a file",
    "learning_rate=fast": "learning_rate=fast: .*could not be converted to Float",
    "learning_rate=nan": "learning_rate=nan must be a finite number",
    "learning_rate=inf": "learning_rate=inf must be a finite number",
    "learning_rate=null": "learning_rate cannot be null",
    "learning_rate=0": "learning_rate=0.0 must be greater than 0",
    "learning_rate=[1": "learning_rate=.1: this is no float",
    "t_text=4.5": "t_text=4.5: .*could not be converted to Integer",
    "t_text=true": "t_text=true: .*could not be converted to Integer",
    "force_redump=maybe": "force_redump=maybe: .*not a valid bool",
    "betas=0.9": "betas is a list",
    "betas=[0.9]": "must be two numbers",
    "dataset=wiki": "dataset is a section; set its keys, e.g. dataset.name=",
    "layer_l=-1": "layer_l=-1 must not be negative",
    "device=tpu": "device=tpu must be one of: auto, cpu, cuda",
    "verbalizer.mode=half": "verbalizer.mode=half must be one of: frozen, lora, full",
    "wandb.mode=on": "wandb.mode=on must be one of: offline, online, disabled",
    "max_train_steps=5x": "max_train_steps: '5x' is no duration",
    "max_train_steps=1.5os": "only epochs may be fractional",
    "max_train_steps=0s": "max_train_steps=0s must be greater than 0",
    "log_interval=-1s": "log_interval: '-1s' is no duration",
    "gumbel_tau_schedule.end_value=0": "tau must be greater than 0",
    "verbalizer.prompt=no slot": "must hold the slot <act> exactly once",
    "verbalizer.prompt=<act><act>": "must hold the slot <act> exactly once",
    "activation_dumper.min_pos=64": "leaves no position in sequences",
    "activation_dumper.num_samples=0": "must be -1 .all. or greater than 0",
    "dataset.val_fraction=1": "must lie between 0 and 1",
    "dataset.max_documents=0": "greater than 0, or null",
    "lora.dropout=1": "lora.dropout=1.0 must lie in",
    "mse_weight=0": "every loss weight is 0",
    "run_name=${nowhere}": "Interpolation key 'nowhere' not found",
    "batch_size=1:30": "batch_size=1:30: .*could not be converted to Integer",
    "learning_rate=1:30": "learning_rate=1:30: .*could not be converted to Float",
    "seed=99999999999999999999999": r"seed=9+ must be less than 2\*\*63",
    f"run_name={'n' * 300}": "is too long for a folder: at most 200 bytes",
    f"max_train_steps={'9' * 309}s": "is no duration: the number is too large",
    "max_train_steps=1e300e": "is no duration: the number is too large",
    "num_train_epochs=1e300": "num_train_epochs: .* is no duration: the number is too large",
    f"t_text={'9' * 5000}": "this is no int",
    "run_name=caf\udce9": r"run_name='caf\\udce9' holds a null character or bytes that are no UTF-8",
    "config=": "config= is empty",
    "config=conf/nowhere.yaml": "config file conf/nowhere.yaml does not exist",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_bad_arguments_are_refused_in_one_line(argument):
    with pytest.raises(ConfigError, match=REFUSED[argument]) as caught:
        load_config([argument])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kl_base_weight=1", "batch_size=7"], "kl_base_weight needs an even batch_size"),
        (["num_train_epochs=0"], "num_train_epochs must be greater than 0 when max_train_steps is null"),
        (
            ["alpha_schedule.type=exponential", "alpha_schedule.end_value=0"],
            "alpha_schedule: an exponential schedule needs ends greater than 0",
        ),
        (["config=a.yaml", "config=b.yaml"], "config= is given 2 times"),
    ],
)
def test_impossible_combinations_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_config(arguments)


BAD_FILES = {
    "learning_rat: 1": r"unknown key 'learning_rat' in .*bad.yaml; did you mean 'learning_rate'\?",
    "dataset:\n  nam: x": r"unknown key 'dataset.nam' .*did you mean 'dataset.name'\?",
    "learning_rate: fast": "bad.yaml: learning_rate: .*could not be converted to Float",
    "learning_rate:": "bad.yaml: learning_rate cannot be null",
    "dataset: wiki": "bad.yaml: dataset is a section",
    "betas: 0.9": "bad.yaml: betas is a list",
    "t_text: [": "bad.yaml is no valid YAML",
    "learning_rate: 1:30": "bad.yaml: learning_rate: Value '1:30' .*could not be converted to Float",
    "run_name: ${oc.env:NOPE_NOT_SET}": "^run_name: .?Environment variable 'NOPE_NOT_SET' not found",
    'run_name: "a\\0b"': "holds a null character",
    "dataset.nam: x": r"unknown key 'dataset.nam' .*did you mean 'dataset.name'\?",
    "dataset.name: x\ndataset: {name: y}": "bad.yaml: dataset is given twice, once as a section and once with a dot",
    "dataset: {name: y}\ndataset.name: x": "bad.yaml: dataset.name is given twice",
    "a: &a [*a]": "bad.yaml is no valid YAML: its aliases stand for more than",
    "run_name: !!python/name:os.system": "bad.yaml is no valid YAML: could not determine a constructor",
    "t_text: 3\nt_text: 4": "bad.yaml is no valid YAML: .*duplicate key",
    "- t_text": "bad.yaml holds no key: value pairs",
    "5": "bad.yaml holds no key: value pairs",
    "defaults: parent": "defaults: is a list",
    "defaults: [bad]": "defaults lead back to itself",
    "defaults: [absent]": "absent.yaml does not exist",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files_are_refused_by_name_in_one_line(text, tmp_path):
    with pytest.raises(ConfigError, match=BAD_FILES[text]) as caught:
        load_config([write(tmp_path / "bad.yaml", text)])
    assert len(str(caught.value).splitlines()) == 1


def test_a_misspelt_file_names_its_neighbour(tmp_path):
    write(tmp_path / "demo.yaml", "t_text: 3")
    with pytest.raises(ConfigError, match=r"demp.yaml does not exist; did you mean .*demo.yaml\?"):
        load_config([f"config={tmp_path / 'demp.yaml'}"])


def test_a_folder_is_told_from_a_missing_file(tmp_path):
    write(tmp_path / "demo.yaml", "t_text: 3")
    with pytest.raises(ConfigError, match=r"is a folder; name one of its files, e.g. config=.*demo.yaml"):
        load_config([f"config={tmp_path}"])


def test_files_are_read_as_yaml_1_2(tmp_path):
    text = "\ufeffdataset: {config_name: no, name: 2026-01-01}\nrun_name: 001\nlearning_rate: 1e-5\nbatch_size: 010\nmix: [007, on]"
    config = load_config([write(tmp_path / "a.yaml", text)])
    assert (config.dataset.config_name, config.dataset.name, config.run_name) == ("no", "2026-01-01", "001")
    assert (config.learning_rate, config.batch_size, config.mix) == (1e-5, 10, ["007", "on"])
    assert load_config([write(tmp_path / "b.yaml", "run_name: 1.10\nwandb.mode: offline\nt_text: 0x8")]).run_name == "1.10"
    assert load_config(["batch_size=010", "learning_rate=1e-5"]).batch_size == 10


def test_dotted_keys_of_a_file_are_sections(tmp_path):
    text = "dataset.name: x\ndataset: {min_words: 3}\nlr_multipliers.verbalizer: {prompt: 0.5}\nterms.extra: 1.0"
    config = load_config([write(tmp_path / "a.yaml", text)])
    assert (config.dataset.name, config.dataset.min_words, config.lr_multipliers.verbalizer.prompt.value) == ("x", 3, 0.5)
    assert config.terms["extra"].value == 1.0


def test_a_run_may_be_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NAME_OF_A_RUN", "nightly")
    file = write(tmp_path / "a.yaml", "run_name: ${oc.env:NAME_OF_A_RUN}\nwandb.project: ${run_name}")
    assert (load_config([file]).run_name, load_config([file]).wandb.project) == ("nightly", "nightly")


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_config([write(tmp_path / "empty.yaml", ""), "run_name=x"]) == load_config(["run_name=x"])


@pytest.mark.parametrize(
    "argument, key, value",
    [
        ("--max_train_steps=None", "max_train_steps", None),
        ("--betas=[0.8, 0.9]", "betas", [0.8, 0.9]),
        ("--force_redump=True", "force_redump", True),
        ("--learning_rate=1e-05", "learning_rate", 1e-5),
        ("--alpha_schedule={'value': 0.2}", "alpha_schedule", Schedule(value=0.2)),
    ],
)
def test_values_as_wandbs_agent_writes_them(argument, key, value):
    assert getattr(load_config(["max_train_steps=5s", argument]), key) == value


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"betas": [0.9, {"a": 1}]}, "betas=[0.9, {'a': 1}] must hold numbers, not {'a': 1}"),
        ({"activation_dumper": {"layers": [[1]]}}, "activation_dumper.layers=[[1]] must hold whole numbers, not [1]"),
    ],
)
def test_a_list_holds_what_its_setting_says(values, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        config_from_dict(values)
