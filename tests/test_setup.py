"""What is installed is what is used and what was tested, and a machine that lacks something is told so."""

import ast
import re
import sys

import check_machine
from conftest import ROOT, SLOW
from packaging.requirements import Requirement
from packaging.version import Version

import megalens

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
LINES = re.findall(r'^    "([\w.-]+[<>=].*?)",(.*)$', SETUP, flags=re.MULTILINE)
REQUIREMENTS = {Requirement(line).name: Requirement(line) for line, _ in LINES}
IMPORT_NAMES = {
    "yaml": "omegaconf",
    "triton": "torch",
    "packaging": "pytest",
    "setuptools": "torch",
    "pydantic_core": "pydantic",
}  # come with these


def test_every_dependency_says_what_it_is_for():
    assert len(LINES) >= 10
    assert [line for line, why in LINES if len(why.split("#")[-1].split()) < 2] == []


def test_every_dependency_has_a_tested_version_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert [name for name, requirement in REQUIREMENTS.items() if tested.get(name) not in requirement.specifier] == []


def test_every_import_is_a_declared_dependency():
    files = [file for folder in ("megalens", "tools", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    ours = {"megalens", "conftest", *(file.stem for file in files)}
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    foreign = {IMPORT_NAMES.get(name, name) for name in imported - ours - sys.stdlib_module_names}
    assert foreign - set(REQUIREMENTS) == set()


def test_this_machine_lacks_nothing():
    assert check_machine.missing() is None


def test_a_missing_compiler_is_named_with_its_mend(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert check_machine.missing() == (
        "no C++ compiler 'no-such-compiler -O2' (torch.compile and DeepSpeed build with it); install g++ or name one: make CXX=clang++"
    )


def test_an_old_python_is_named_with_its_mend(monkeypatch):
    monkeypatch.setattr(check_machine.sys, "version_info", (3, 9, 1))
    assert check_machine.missing().startswith("Python 3.11 or newer is needed, this is 3.9; name one: make PYTHON=")


def test_the_oldest_versions_are_the_lower_bounds_that_are_promised():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    bounds = {name: next(spec.version for spec in each.specifier if spec.operator == ">=") for name, each in REQUIREMENTS.items()}
    assert {name: bound for name, bound in bounds.items() if Version(oldest[name]) != Version(bound)} == {}


def test_the_version_stands_in_one_place():
    assert f'__version__ = "{megalens.__version__}"' in (ROOT / "megalens" / "__init__.py").read_text()
    assert megalens.__version__ not in SETUP
    assert f"## [{megalens.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_what_quick_leaves_out_is_there():
    assert [name for name in SLOW if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []
