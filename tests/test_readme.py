"""The README tells the truth: every command in it runs as printed, its Python too, and its table is one the evaluation prints.

The commands run in a stand-in for a user's folder after `make demo`: a tiny random model and corpus in the places of SmolLM2 and the
wiki leads, and conf/demo.yaml with its own settings but only a few steps long.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT
from pyarrow import parquet

from megalens import tiny

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = {
    "make demo": "installs the environment and takes minutes on the real model; its three commands run here on a stand-in",
    "make test": "is this test suite",
}
SHORT = """
batch_size: 4
max_train_steps: 2s
lr_scheduler: {warmup_steps: 0s}
validation: {interval: 1s, num_samples: 4, num_examples: 1}
checkpoint: {save_interval: 1s}
activation_dumper: {num_samples: 32, val_num_samples: 8}
evaluation: {num_samples: 8, batch_size: 4, bootstrap: 10, examples: 2, report_documents: 1}
pretokenize: {num_proc: 1}
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def after_make_demo(tmp_path, monkeypatch):
    """A user's folder in which the demo's model and text are tiny and its trainings a few steps long."""
    for name in ("megalens", "tools", "ds_configs", "benchmarks", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "full").symlink_to(ROOT / "conf")
    for file in (ROOT / "conf").glob("*.yaml"):
        short = SHORT if file.stem.startswith("demo") else ""
        (conf / file.name).write_text(f"defaults: [full/{file.stem}]\n{short}", encoding="utf-8")
    data = tmp_path / "data"
    tiny.make_model(data / "models" / "SmolLM2-135M-Instruct", num_hidden_layers=21)
    texts = list(tiny.articles(200, seed=0))
    (data / "corpus").mkdir()
    parquet.write_table(pa.table({"title": texts, "topic": texts, "gloss": texts, "text": texts}), data / "corpus" / "wiki-leads.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    return tmp_path


def run(command):
    result = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}"


@pytest.mark.minutes
def test_every_command_and_the_python_run_as_printed(after_make_demo):
    for command in commands():
        if command not in NOT_RUN:
            run(command)
    for code in blocks("python"):
        run(shlex.join(["python", "-c", code]))


def test_what_is_not_run_is_in_the_readme():
    assert set(NOT_RUN) <= set(commands())


def test_make_demo_runs_only_commands_that_the_readme_shows():
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    made = [line.strip().replace("$(VENV)/bin/", "") for line in recipe.splitlines()]
    assert made
    assert set(made) <= set(commands())


def test_every_tool_of_the_readme_prints_its_help():
    tools = sorted({word for command in commands() for word in command.split() if word.endswith(".py")})
    assert "tools/run_pipeline.py" in tools
    for tool in tools:
        result = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert tool in result.stdout, f"{tool} --help does not show how it is called"


def test_the_table_is_what_the_evaluation_prints():
    from megalens.evaluate.baselines import SOURCES
    from megalens.evaluate.metrics import TABLES

    table = re.search(r"<!-- demo table: begin -->\n```text\n(.*?)```\n<!-- demo table: end -->", README, flags=re.DOTALL)[1]
    figures, _, examples = table.partition("context ends with")
    headers = [line.split() for line in figures.splitlines() if line.strip() and line.startswith("  ")]
    assert [tuple(header) for header in headers] == list(TABLES)
    missing = [label for label, _ in SOURCES.values() if table.count(f"{label} ") < len(TABLES)]
    assert missing == []
    assert len([line for line in examples.splitlines() if " → " in line]) == 12 + 1


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
