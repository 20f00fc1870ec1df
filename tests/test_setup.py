"""What is installed is what is used and what was tested, and a machine that lacks something is told so."""

import ast
import re
import sys

import check_machine
from conftest import ROOT
from packaging.requirements import Requirement

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
LINES = re.findall(r'^    "([\w.-]+[<>=].*?)",(.*)$', SETUP, flags=re.MULTILINE)
REQUIREMENTS = {Requirement(line).name: Requirement(line) for line, _ in LINES}
IMPORT_NAMES = {"yaml": "omegaconf", "triton": "torch", "packaging": "pytest", "setuptools": "torch"}  # come with these


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
