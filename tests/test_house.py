"""The house rules that no linter knows: sizes, docstrings, and what prose may not say."""

import ast
import re
import tomllib

import pytest
from conftest import ROOT

FOLDERS = ("megalens", "tools", "tests", "benchmarks", "docs", "conf", "sweeps")
FILES = sorted((ROOT / "megalens").rglob("*.py"))


def definitions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_small_and_its_public_names_are_documented(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    long = {node.name: node.end_lineno - node.lineno + 1 for node in definitions(tree)}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node) and node.name != "main"] == []
    assert ast.get_docstring(tree) or not tree.body


def test_prose_says_cannot():
    prose = [path for kind in ("py", "md", "yaml") for folder in FOLDERS for path in sorted((ROOT / folder).rglob(f"*.{kind}"))]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*sorted(ROOT.glob("*.md")), *prose]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "can" + " not " in line
    ]
    assert found == []


def test_the_architecture_lists_the_rooms_in_the_order_that_imports_keep():
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    place = {room: i for i, layer in enumerate(contract["layers"]) for room in re.findall(r"\w+", layer)}
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("| room | holds |")[1].split("\n\n")[0]
    rooms = [re.findall(r"`(\w+)(?:/|\.py)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    assert sorted(room for line in rooms for room in line) == sorted(place)
    assert [min(place[room] for room in line) for line in rooms] == sorted(min(place[room] for room in line) for line in rooms)
