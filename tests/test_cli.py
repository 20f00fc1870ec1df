"""What every command does alike, the command `megalens` that finds them, and how they read their line."""

from __future__ import annotations

import errno
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import megalens
from megalens import commands
from megalens.arguments import Arguments, number_above_zero, whole_number
from megalens.cli import run
from megalens.config import ConfigError
from megalens.data import DataError

SCRIPTS = sorted(path.name for path in (ROOT / "tools").glob("*.py") if path.name != "check_machine.py")

HERE = os.environ | {"PYTHONPATH": str(ROOT)}


def call(monkeypatch, action, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as stop:
        run(action, "Do it.\n\nusage: tool")
    return stop.value.code or 0


def failing(error: Exception):
    def action(_):
        raise error

    return action


@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help_prints_the_docstring_and_does_nothing(monkeypatch, capsys, argument):
    assert call(monkeypatch, failing(ConfigError("not called")), argument, "x=1") == 0
    assert capsys.readouterr().out == "Do it.\n\nusage: tool\n"


@pytest.mark.parametrize("error", [ConfigError("a\n  b"), DataError("a b")])
def test_our_errors_are_one_line_and_exit_code_1(monkeypatch, capsys, error):
    assert call(monkeypatch, failing(error)) == 1
    assert capsys.readouterr().err == "error: a b\n"


def test_an_error_with_complaints_is_a_line_each(monkeypatch, capsys):
    error = ConfigError("a\nb")
    error.complaints = ("file: a", "file: b")
    assert call(monkeypatch, failing(error)) == 1
    assert capsys.readouterr().err == "error: file: a\nerror: file: b\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has more"),
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (
            RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
            "can't allocate memory: you tried",
        ),
        (RuntimeError("CUDA error: out of memory\nmore"), "CUDA error: out of memory more"),
        (MemoryError(), "Python had none left"),
    ],
)
def test_out_of_memory_is_one_line_that_names_what_needs_less(monkeypatch, capsys, error, said):
    assert call(monkeypatch, failing(error)) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: out of memory ({said}); lower batch_size")
    assert line.count("\n") == 1
    assert all(mend in line for mend in ("gradient_accumulation_steps", "checkpoint_every_n_tokens", "z3_offload.json"))


def test_no_memory_of_the_cpu_is_told_as_such(monkeypatch, capsys):
    assert call(monkeypatch, lambda _: torch.empty(10**16)) == 1
    assert capsys.readouterr().err.startswith("error: out of memory (can't allocate memory")


def test_numbers_that_are_not_finite_are_one_line_with_the_mend(monkeypatch, capsys):
    assert call(monkeypatch, failing(FloatingPointError("the hidden state of sample 3 is not finite"))) == 1
    assert capsys.readouterr().err == (
        "error: the hidden state of sample 3 is not finite; lower learning_rate, or compute with dtype=fp32\n"
    )


PRINTS = "from megalens import cli; cli.run(lambda _: print('a → b', open('kept', 'w').write('x')), 'doc')"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_fails_no_command_and_spoils_no_file(tmp_path, closed):
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, PRINTS], cwd=tmp_path, env=HERE, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kept").read_text() == "x"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "ascii:strict"])
def test_a_terminal_without_our_signs_fails_no_command(tmp_path, encoding):
    environment = HERE | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINTS], cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"a \\u2192 b 1\n"), done.stderr


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    assert call(monkeypatch, failing(OSError(errno.ENOSPC, "No space left on device", "x"))) == 1
    assert capsys.readouterr().err == "error: No space left on device: x\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")])
def test_bugs_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(type(error)):
        run(failing(error), "doc")


def test_exit_codes(monkeypatch, capsys):
    assert call(monkeypatch, lambda _: None) == 0
    assert call(monkeypatch, lambda _: 3) == 3
    assert call(monkeypatch, failing(KeyboardInterrupt())) == 130
    assert call(monkeypatch, lambda arguments: len(arguments), "a", "b") == 2


def test_a_missing_package_is_named_with_the_mend_and_a_missing_module_of_ours_is_a_bug(monkeypatch, capsys):
    assert call(monkeypatch, failing(ModuleNotFoundError("No module named 'torch'", name="torch"))) == 1
    assert capsys.readouterr().err.startswith("error: torch is not installed for ")
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(ModuleNotFoundError):
        run(failing(ModuleNotFoundError("No module named 'megalens.x'", name="megalens.x")), "")


# ---------------------------------------------------------------------------------------------------------- the command


def megalens_says(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["megalens", *arguments])
    code = 0
    try:
        commands.main()
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_the_overview_has_a_line_for_every_command(monkeypatch, capsys, arguments):
    code, out, _ = megalens_says(monkeypatch, capsys, *arguments)
    assert code == 0
    lines = dict(re.findall(r"^  ([\w-]+) +(\S.*)$", out, flags=re.MULTILINE))
    assert list(lines) == list(commands.COMMANDS)
    assert [name for name, line in lines.items() if not line.endswith((".", ":"))] == []


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_is_a_module_whose_docstring_shows_how_it_is_called(name):
    module = commands.COMMANDS[name]
    assert f"megalens {name}" in commands.docstring(module) or name == "train"
    assert callable(importlib.import_module(module).main)


def test_an_unknown_command_names_the_nearest(monkeypatch, capsys):
    assert megalens_says(monkeypatch, capsys, "pretokenise", "x=1") == (
        1,
        "",
        "error: there is no command 'pretokenise'; did you mean 'megalens pretokenize'?\n",
    )
    assert "megalens --help lists them" in megalens_says(monkeypatch, capsys, "zzzz")[2]


def test_the_version_is_printed(monkeypatch, capsys):
    assert megalens_says(monkeypatch, capsys, "--version")[:2] == (0, f"{megalens.__version__}\n")


def test_a_command_gets_its_arguments_and_exits_with_its_code(monkeypatch, capsys):
    code, _, err = megalens_says(monkeypatch, capsys, "dump", "layer_k=1")
    assert code == 1
    assert err == "error: unknown key 'layer_k' in the command line; did you mean 'layer_l'?\n"


def test_help_needs_no_library():
    code = "import sys, runpy; sys.argv = ['megalens', 'explain', '--help']\ntry: runpy.run_module('megalens', run_name='__main__')\n"
    code += "finally: print('loaded:', {'torch', 'omegaconf', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: set()\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_a_command_and_its_help_shows_the_script(script):
    done = subprocess.run([sys.executable, f"tools/{script}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python tools/{script}" in done.stdout
    assert len((ROOT / "tools" / script).read_text().splitlines()) < 10


# ------------------------------------------------------------------------------------------------------------- the line


def parser() -> Arguments:
    made = Arguments("megalens x FOLDER")
    made.add_argument("folder")
    made.add_argument("--rows", type=whole_number(1), default=5)
    made.add_argument("--tokens", type=number_above_zero, default=1e9)
    made.add_argument("--html")
    made.add_argument("--json", action="store_true")
    return made


@pytest.mark.parametrize("rows", [["rows=7"], ["--rows=7"], ["--rows", "7"]])
def test_an_option_is_written_in_three_ways_anywhere_in_the_line(rows):
    for line in ([*rows, "here", "t_text=3"], ["here", *rows, "t_text=3"], ["t_text=3", "here", *rows]):
        found, settings = parser().split(line)
        assert (found.folder, found.rows, found.json, settings) == ("here", 7, False, ["t_text=3"])


def test_settings_keep_their_order_and_deepspeed_its_file():
    line = ["seed=1", "--deepspeed", "z3.json", "--json", "here", "--layer_l=2", "--local_rank=0", "config=a.yaml"]
    found, settings = parser().split(line)
    assert found.json
    assert settings == ["seed=1", "--deepspeed", "z3.json", "--layer_l=2", "--local_rank=0", "config=a.yaml"]


def test_a_word_may_hold_an_equals_sign_and_begin_with_a_dash():
    assert parser().split(["data/a=b"])[0].folder == "data/a=b"
    assert parser().split(["-"])[0].folder == "-"
    assert parser().split(["rows=2", "--", "--json"])[0].folder == "--json"
    assert parser().split(["here", "--html", "a=b.html"])[0].html == "a=b.html"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["here", "rowz=3"], "unknown key 'rowz' in the command line; did you mean 'rows'?"),
        (["here", "layer_k=3"], "unknown key 'layer_k' in the command line; did you mean 'layer_l'?"),
        (["here", "--jsn"], "unknown option --jsn; write: megalens x FOLDER"),
        (["here", "there"], "'there' is one word too many"),
        (["here", "rows=0"], "rows: 0 must be a whole number of 1 or more"),
        (["here", "tokens=nan"], "tokens: nan must be a number greater than 0"),
        (["here", "--html"], "html: expected one argument"),
        ([], "the following arguments are required: folder"),
    ],
)
def test_what_is_not_understood_is_one_line_with_the_mend(line, message):
    with pytest.raises(ConfigError) as caught:
        parser().split(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_command_without_settings_takes_none():
    with pytest.raises(ConfigError, match="unknown key 't_text' in the command line"):
        parser().read(["here", "t_text=3"])
