"""README and tutorial tell the truth: their commands and Python run as printed, and the README's table is one the evaluation prints.

The README's commands run in a stand-in for a user's folder after `make demo`: a tiny random model and corpus in the places of SmolLM2 and
the wiki leads, and conf/demo.yaml with its own settings but only a few steps long. The tutorial's run in a folder with nothing made yet.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import quick
from conftest import ROOT
from pyarrow import parquet

from megalens import tiny
from megalens.config import load_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
NOT_RUN = {
    "make": "installs the environment that the tests run in",
    ". .venv/bin/activate": "the tests put the environment first in the path",
    "make demo": "installs the environment and takes minutes on the real model; its three commands run here on a stand-in",
    "make test": "is this test suite",
}
EXAMPLES = {"megalens/families/makes/mup_llama.py", "megalens/checkpoint/formats/one_file.py"}  # files that a reader may write
SHORT = """
batch_size: 4
max_train_steps: 2s
lr_scheduler: {warmup_steps: 0s}
validation: {interval: 1s, num_samples: 4, num_examples: 1}
checkpoint: {save_interval: 1s}
activation_dumper: {num_samples: 32, val_num_samples: 8}
evaluation: {num_samples: 8, trust_rows: 8, batch_size: 4, bootstrap: 10, examples: 2, report_documents: 1}
pretokenize: {num_proc: 1}
"""


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def commands(page):
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def checked_out(tmp_path, monkeypatch):
    """A user's folder with the repository's files but conf/, and nothing made yet; its environment is active."""
    for name in ("megalens", "tools", "ds_configs", "benchmarks", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def after_make_demo(checked_out):
    """A user's folder in which the demo's model and text are tiny and its trainings a few steps long."""
    conf = checked_out / "conf"
    conf.mkdir()
    (conf / "full").symlink_to(ROOT / "conf")
    for file in (ROOT / "conf").glob("*.yaml"):
        short = SHORT if file.stem.startswith("demo") else ""
        (conf / file.name).write_text(f"defaults: [full/{file.stem}]\n{short}", encoding="utf-8")
    data = checked_out / "data"
    tiny.make_model(data / "models" / "SmolLM2-135M-Instruct", num_hidden_layers=21)
    texts = list(tiny.articles(200, seed=0))
    (data / "corpus").mkdir()
    parquet.write_table(pa.table({"title": texts, "topic": texts, "gloss": texts, "text": texts}), data / "corpus" / "wiki-leads.parquet")


def run(command):
    """Run a line as bash does; Python is started in the quick way (tests/quick.py) where nothing but words stands behind it.

    ``megalens`` is this package's command, whatever is installed; tests/test_wheel.py tries the installed one.
    """
    words = shlex.split(command)
    if words[0] == "megalens":
        words[:1] = ["python", "-m", "megalens"]
    if words[0] == "python" and not set(command) & set("|&;<>$`*"):
        done = quick.run(words)
    else:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def run_page(page):
    for command in commands(page):
        if command not in NOT_RUN:
            run(command)
    for code in blocks(page, "python"):
        Path("from_python.py").write_text(code, encoding="utf-8")
        run("python from_python.py")


@pytest.mark.minutes
def test_every_command_and_the_python_of_the_readme_run_as_printed(after_make_demo):
    run_page(README)


@pytest.mark.minutes
def test_every_command_and_the_python_of_the_tutorial_run_as_printed(checked_out):
    (checked_out / "conf").symlink_to(ROOT / "conf")
    run_page(TUTORIAL)


def test_what_is_not_run_is_on_a_page():
    assert set(NOT_RUN) <= {*commands(README), *commands(TUTORIAL)}


@pytest.mark.parametrize("page", [README, TUTORIAL], ids=["README", "tutorial"])
def test_settings_of_a_page_are_accepted(page, checked_out):
    (checked_out / "conf").mkdir()
    for file in (ROOT / "conf").glob("*.yaml"):
        (checked_out / "conf" / file.name).symlink_to(file)
    (settings,) = blocks(page, "yaml")
    (checked_out / "conf" / "page.yaml").write_text(settings, encoding="utf-8")
    assert load_config(["config=conf/page.yaml"]).model_name == "org/any-causal-lm"


def test_make_demo_runs_only_commands_that_the_readme_shows():
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    made = [line.strip().replace("$(VENV)/bin/", "") for line in recipe.splitlines()]
    assert made
    assert set(made) <= set(commands(README))


def test_every_tool_of_the_readme_prints_its_help():
    tools = sorted({word for command in commands(README) for word in command.split() if word.endswith(".py")})
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
    assert [tuple(header) for header in headers][: len(TABLES)] == list(TABLES)
    missing = [label for label, _ in SOURCES.values() if table.count(f"{label} ") < len(TABLES)]
    assert missing == []
    assert len([line for line in examples.splitlines() if " → " in line]) == 12 + 1


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_lead_somewhere(path):
    """Files that it links to, headings in them, and files of the repository or the package that it names."""
    text = path.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        aim = path.parent / file if file else path
        if not target.startswith("http") and (not aim.exists() or (heading and heading not in headings(aim))):
            broken.append(target)
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|sh|sbatch|yaml))[`\s]", text)) - EXAMPLES
    assert broken + [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "megalens"))] == []


def headings(path):
    """The anchors of a page's headings."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}
