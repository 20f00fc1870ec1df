"""Sweep files: ours pass W&B's own schema and name settings that exist, the seed's run as written, and each mistake is one line."""

import warnings

import pytest
import yaml
from conftest import ROOT

from megalens.sweep import SweepError
from megalens.sweep.file import Halving, Range, read_sweep
from megalens.sweep.search import Search

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # W&B's package is written for an older pydantic
    from sweeps.config import schema_violations_from_proposed_config

FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
CONFIG = "config: {value: conf/tiny.yaml}"
GRID = f"{{program: megalens/train.py, method: grid, parameters: {{%s, {CONFIG}}}}}"
COMMAND = f"{{program: megalens/train.py, method: grid, command: %s, parameters: {{t_text: {{values: [4]}}, {CONFIG}}}}}"
RANDOM = GRID.replace("grid", "random")
PRINTED = {  # the blocks that the design document prints, but for program:
    "grid": """
method: grid
metric:
  goal: minimize
  name: train/loss
parameters:
  learning_rate:
    values: [1.0e-3, 7.0e-4, 5.0e-4, 3.0e-4, 1.0e-4, 7.0e-5, 5.0e-5, 1.0e-5]
  config:
    value: conf/simplestories_frozenl4e40p1largebatch3072.yaml
  num_train_epochs:
    value: 5
""",
    "bayes": """
method: bayes
metric:
  goal: minimize
  name: train/loss
parameters:
  learning_rate:
    distribution: log_uniform_values
    min: 1.0e-5
    max: 1.0e-3
  batch_size:
    values: [16, 32, 64, 128]
""",
    "parameters": """
method: grid
parameters:
  learning_rate:
    values: [1.0e-3, 5.0e-4, 1.0e-4]
  alpha_schedule.value:
    values: [0.05, 0.1, 0.2]
  t_text:
    values: [4, 6, 8]
""",
    "hyperband": """
method: random
early_terminate:
  type: hyperband
  min_iter: 3
  eta: 2
parameters:
  learning_rate:
    distribution: log_uniform_values
    min: 1.0e-5
    max: 1.0e-3
""",
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def read(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
    return read_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_our_files_pass_wandbs_schema_and_every_parameter_is_a_key_of_ours(file):
    assert schema_violations_from_proposed_config(yaml.safe_load(file.read_text())) == []
    sweep = read_sweep(file)
    assert (ROOT / sweep.program).is_file()
    assert sweep.searched


def test_wandbs_schema_refuses_what_is_wrong():
    assert schema_violations_from_proposed_config({"method": "grd", "parameters": {"a": {"valuess": [1]}}})


@pytest.mark.parametrize("text", PRINTED.values(), ids=PRINTED)
def test_the_printed_sweeps_are_read_as_they_stand(tmp_path, text):
    assert schema_violations_from_proposed_config(yaml.safe_load(text)) == []
    assert "learning_rate" in read(tmp_path, "program: tools/run_pipeline.py\n" + text).searched


def test_what_a_file_says_is_what_is_read(tmp_path):
    sweep = read(tmp_path, "program: tools/run_pipeline.py\n" + PRINTED["hyperband"])
    assert sweep.ranges == {"learning_rate": Range(1e-5, 1e-3, log=True)}
    assert (sweep.halving, sweep.metric, sweep.maximize) == (Halving(3, 2), "train/loss", False)
    grid = list(read(tmp_path, "program: tools/run_pipeline.py\n" + PRINTED["parameters"]).grid())
    assert len(grid) == 27
    assert grid[1] == {"learning_rate": 1e-3, "alpha_schedule.value": 0.05, "t_text": 6}


def test_nested_parameters_and_whole_numbers(tmp_path):
    parameters = f"{{lora: {{parameters: {{r: {{min: 2, max: 8}}}}}}, {CONFIG}}}"
    text = f"{{program: p, method: random, metric: {{name: val/loss}}, parameters: {parameters}}}"
    assert read(tmp_path, text).ranges == {"lora.r": Range(2, 8, whole=True)}


@pytest.mark.parametrize(
    "command", ["['${interpreter}', '${program}', '${args_no_hyphens}']", "[env, 'A=${envvar:HOME}', sh, '${args}', 1]"]
)
def test_other_commands_are_taken(tmp_path, command):
    assert read(tmp_path, COMMAND % command).command


def test_numbers_need_no_dot_and_text_stays_as_it_is_written(tmp_path):
    ranged = RANDOM % "learning_rate: {distribution: q_uniform, min: 1e-3, max: 1e-2, q: 1e-3}"
    assert read(tmp_path, ranged).ranges == {"learning_rate": Range(1e-3, 1e-2, step=1e-3)}
    sweep = read(tmp_path, GRID % "wandb.project: {values: [2026-01-01, no, 001]}, learning_rate: {value: 2e-5}")
    assert sweep.choices == {"wandb.project": ["2026-01-01", "no", "001"]}
    assert sweep.config({"wandb.project": "001"}).learning_rate == 2e-5


def test_a_key_of_whole_numbers_is_drawn_in_whole_steps(tmp_path):
    sweep = read(tmp_path, RANDOM % "batch_size: {distribution: q_uniform, min: 8, max: 32, q: 8}")
    assert sweep.ranges == {"batch_size": Range(8, 32, whole=True, step=8)}
    search = Search(sweep, tmp_path / "search", count=12)
    drawn = {search.claim().point["batch_size"] for _ in range(12)}
    assert drawn <= {8, 16, 24, 32}
    assert len(drawn) > 1
    assert all(isinstance(size, int) for size in drawn)


REFUSED = {
    "parameters: {": "is no valid YAML",
    "method: grid": "a sweep has method:, program:, metric: and parameters:",
    GRID.replace("grid", "grd") % "t_text: {values: [4]}": "method: grd must be one of: grid, random, bayes",
    GRID.replace("program: megalens/train.py, ", "") % "t_text: {values: [4]}": "program: is missing; tools/run_pipeline.py",
    GRID % "learning_rat: {values: [1.0]}": "unknown key 'learning_rat' in the sweep file; did you mean 'learning_rate'?",
    GRID % "learning_rate: {values: ['']}": "learning_rate= is empty",
    GRID % "learning_rate: {values: [0.1, -1.0]}": "learning_rate=-1.0 must be greater than 0",
    GRID % "learning_rate: {min: 0.1, max: 1.0}": "learning_rate: a grid needs values: [...], not a range",
    GRID % "learning_rate: [1, 2]": "learning_rate: write learning_rate: {value: ...}",
    GRID.replace("grid", "random, metric: {name: x}") % "learning_rate: {min: 1.0, max: 0.1}": "min: 1.0 must be less than max: 0.1",
    GRID.replace("grid", "random, metric: {name: x}") % "learning_rate: {min: 1.0, max: .inf}": "must be finite, and their difference too",
    GRID.replace("grid", "random, metric: {name: x}") % "learning_rate: {min: -1.7e308, max: 1.7e308}": "and their difference too",
    GRID.replace("grid", "random, metric: {name: x}") % "learning_rate: {min: 1.0, max: 2.0, distribution: normal}": "not known offline",
    GRID.replace("grid", "random, metric: {name: x}, early_terminate: {type: hyperband}")
    % "t_text: {values: [4]}": "early_terminate.min_iter",
    COMMAND % "'${env} ${interpreter} ${program} ${args}'": "command: is a list of text and macros, e.g. [${env}, ${interpreter}",
    COMMAND % "{a: b}": "command: is a list of text and macros",
    COMMAND % "[]": "command: is a list of text and macros",
    COMMAND % "['${interpreter}', '${program}', '${argz}']": "command: '${argz}' is no macro that runs here; there are: ${env}",
    COMMAND % "['${interpreter}', '${program}', '${args_json}']": "command: '${args_json}' is no macro that runs here",
    COMMAND % "['${interpreter}', '--x=${args}']": "command: '--x=${args}' is no macro that runs here",
    COMMAND % "[python, '${program}']": "command: hands no settings to the trial; add ${args} or ${args_no_hyphens}",
    RANDOM % "learning_rate: {distribution: q_uniform, min: 0.001, max: 0.01, q: 0}": "learning_rate.q: 0 must be a number greater than 0",
    RANDOM % "learning_rate: {distribution: q_uniform, min: 0.001, max: 0.01, q: -1}": "learning_rate.q: -1 must be a number",
    RANDOM % "learning_rate: {distribution: log_uniform, min: 1, max: 1000}": "learning_rate: log_uniform takes logarithms; write",
    RANDOM % "learning_rate: {distribution: log_uniform, min: -1000, max: 1}": "must be greater than 0",
    RANDOM % "t_text: {distribution: int_uniform, min: 8.5, max: 12.5}": "t_text: int_uniform needs whole min: and max:, not 8.5 and 12.5",
    RANDOM % "batch_size: {distribution: uniform, min: 8, max: 32}": "batch_size: takes whole numbers only; write",
    RANDOM % "batch_size: {distribution: log_uniform_values, min: 8, max: 32}": "batch_size: takes whole numbers only",
    RANDOM % "batch_size: {distribution: q_uniform, min: 8, max: 32, q: 0.5}": "batch_size: takes whole numbers only",
    GRID % "learning_rate: {values: [1:30]}": "learning_rate=1:30: Value '1:30' of type 'str' could not be converted to Float",
    GRID.replace("grid", "grid, metric: {name: val_loss}") % "t_text: {values: [4]}": "metric.name: val_loss is no figure of a training",
    GRID.replace("grid", "grid, metric: {name: 3}") % "t_text: {values: [4]}": "metric.name: 3 must be text",
    GRID % "activation_dumper.seq_len: {values: [16, 32]}": "activation_dumper.seq_len changes the dump that all trials share",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: REFUSED[text][:40])
def test_each_mistake_is_one_line_that_names_the_file_and_the_mend(tmp_path, text):
    with pytest.raises(SweepError) as caught:
        read(tmp_path, text)
    assert REFUSED[text] in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "sweep.yaml"))
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_where_to_look(tmp_path):
    with pytest.raises(SweepError, match="does not exist; ls sweeps/"):
        read_sweep(tmp_path / "none.yaml")
