"""The commands: one file each, which reads its line and calls the room that does the work.

``megalens NAME ...`` and the scripts of ``tools/`` run the same functions.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import megalens
from megalens import cli

# In the order in which they are met; the module's docstring is the command's help.
COMMANDS = {
    "make-tiny": "megalens.commands.make_tiny",
    "prepare-demo": "megalens.commands.prepare_demo",
    "pretokenize": "megalens.commands.pretokenize",
    "dump": "megalens.commands.dump",
    "verify": "megalens.commands.verify",
    "inspect": "megalens.commands.inspect",
    "convert": "megalens.commands.convert",
    "write-texts": "megalens.commands.write_texts",
    "plan": "megalens.commands.plan",
    "train": "megalens.train",
    "pipeline": "megalens.commands.pipeline",
    "submit": "megalens.commands.submit",
    "sweep": "megalens.commands.sweep",
    "eval": "megalens.commands.eval",
    "trust": "megalens.commands.trust",
    "explain": "megalens.commands.explain",
    "serve": "megalens.commands.serve",
    "export-lens": "megalens.commands.export_lens",
    "import-lens": "megalens.commands.import_lens",
}


def main() -> None:
    """The console command ``megalens``: run the command that the first argument names, and exit."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(megalens.__version__)
    elif name in COMMANDS:
        run(name, rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        meant = f"did you mean 'megalens {near[0]}'?" if near else "megalens --help lists them"
        print(f"error: there is no command '{name}'; {meant}", file=sys.stderr)
        sys.exit(1)


def run(name: str, arguments: Sequence[str] | None = None, script: str | None = None) -> None:
    """Run one command and exit.

    Args:
        name: a key of :data:`COMMANDS`.
        arguments: ``sys.argv[1:]`` where none are given.
        script: the script that runs it, e.g. ``tools/dump_acts.py``: its help then shows that spelling.
    """
    doc = docstring(COMMANDS[name])
    if script is not None:
        doc = doc.replace(f"megalens {name}", f"python {script}")
    cli.run(lambda given: importlib.import_module(COMMANDS[name]).main(given), doc, arguments)


def overview() -> str:
    """What ``megalens --help`` prints."""
    lines = [f"  {name:<14}{docstring(module).splitlines()[0]}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            megalens.__doc__ or "",
            "",
            "usage: megalens COMMAND ...       megalens COMMAND --help says how",
            "",
            *lines,
            "",
            "megalens --version prints the version.",
        ]
    )


def docstring(module: str) -> str:
    """A module's docstring, read without importing it: help needs no library."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is not there"
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
