"""What every command does alike."""

from __future__ import annotations

import errno
import sys

import pytest

from megalens.cli import run
from megalens.config import ConfigError
from megalens.data import DataError


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


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    assert call(monkeypatch, failing(OSError(errno.ENOSPC, "No space left on device", "x"))) == 1
    assert capsys.readouterr().err == "error: No space left on device: x\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")])
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
