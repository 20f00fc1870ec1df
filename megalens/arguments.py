"""How a command reads its line: its own words and options by argparse, beside the ``key=value`` settings of the configuration."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import NoReturn

from megalens.config import ConfigError
from megalens.config.reading import kind_of, known_keys, nearest

_KEY = re.compile(r"[A-Za-z_][\w.-]*")


class Arguments(argparse.ArgumentParser):
    """The words and options of one command.

    An option that takes a value may be written ``--rows 5``, ``--rows=5`` or ``rows=5``. What follows ``--`` are words.

    Args:
        example: a whole line that works, shown where words are missing.
    """

    def __init__(self, example: str):
        super().__init__(add_help=False, allow_abbrev=False)
        self.example = example

    def split(self, arguments: Iterable[str], settings_known: Iterable[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The command's own words and options, and the settings in their order.

        Args:
            settings_known: keys that are settings of this command; None: every key of the configuration.

        Raises:
            ConfigError: an option or key that the command does not know (the message names the nearest one it does), a value of the
                wrong kind, or a word too few or too many.
        """
        known = sorted(known_keys() if settings_known is None else settings_known)
        accepted = {*known, *(() if settings_known is not None else known_keys(sections=True)), "config", "local_rank", "local-rank"}
        options, words, settings = self._sort(list(arguments))
        for key in (argument.removeprefix("--").partition("=")[0] for argument in settings if "=" in argument):
            if key not in accepted and (settings_known is not None or kind_of(key) is None):
                raise ConfigError(f"unknown key '{key}' in the command line{nearest(key, [*self.keys, *known])}")
        if unknown := [option for option in options if option.partition("=")[0] not in self._option_string_actions]:
            raise ConfigError(f"unknown option {unknown[0]}; write: {self.example}")
        found, left = self.parse_known_args([*options, *(["--", *words] if words else [])])
        if left := [word for word in left if word != "--"]:
            raise ConfigError(f"'{left[0]}' is one word too many; write: {self.example}")
        return found, settings

    def read(self, arguments: Iterable[str]) -> argparse.Namespace:
        """The words and options of a command that takes no settings.

        Raises:
            ConfigError: as of :meth:`split`.
        """
        return self.split(arguments, ())[0]

    @property
    def keys(self) -> list[str]:
        """The names of the options that take a value."""
        return [option.removeprefix("--") for action in self._actions if action.nargs != 0 for option in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Argparse's complaint as an error of ours."""
        raise ConfigError(f"{message.removeprefix('argument ')}; write: {self.example}")

    def _sort(self, rest: list[str]) -> tuple[list[str], list[str], list[str]]:
        """Options, words and settings."""
        options: list[str] = []
        words: list[str] = []
        settings: list[str] = []
        keys = self.keys
        while rest:
            argument = rest.pop(0)
            key, equals, value = argument.removeprefix("--").partition("=")
            if argument == "--":
                words, rest = [*words, *rest], []
            elif argument == "--deepspeed":
                settings += [argument, *rest[:1]]
                rest = rest[1:]
            elif key in keys and equals:
                options.append(f"--{key}={value}")
            elif key in keys and argument.startswith("--"):
                options.append("=".join([argument, *rest[:1]]))
                rest = rest[1:]
            elif equals and _KEY.fullmatch(key):
                settings.append(argument)
            else:
                (options if argument.startswith("--") else words).append(argument)
        return options, words, settings


def whole_number(least: int):
    """An option's type: a whole number of ``least`` or more."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number of {least} or more")
        return int(text)

    return read


def number_above_zero(text: str) -> float:
    """An option's type: a number greater than 0, such as 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number greater than 0")
    return value
