"""Weights and optimizer state on disk: whole float32 tensors by name, whatever engine and however many ranks wrote them.

What fits into one file of :data:`FILE_BYTES` is one, ``<stem>.safetensors``, written by rank 0; more is divided over as many ranks as there
are such files, ``<stem>-00001-of-00004.safetensors`` and so on, so that no rank ever holds or writes the whole of a large state. Any number
of ranks of any engine reads it back, one tensor at a time.

A parameter's weight lies under its name on disk, what the optimizer keeps for it under ``<moment>.<name>``. Engines call parameters as the
module does; whoever writes or reads says what each is called on disk. ``step`` counts the optimizer's steps, ``step.<name>`` those of a
parameter that has rested for some.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalens.files import save_tensors

FILE_BYTES = 4 * 2**30
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}  # what an optimizer keeps for each parameter


class EngineError(ValueError):
    """The training cannot be run as asked. The message is one line and names the mend."""


@dataclass
class Part:
    """A rank's share of a set of tensors, on the CPU: ``index`` of ``count``; a rank whose index is not below ``count`` has none."""

    tensors: dict[str, Tensor]
    index: int = 0
    count: int = 1

    def named(self, names: dict[str, str]) -> Part:
        """The same tensors under other names.

        Args:
            names: what each parameter is called on disk, by its name in the module.
        """
        return dataclasses.replace(self, tensors={_named(key, names): value for key, value in self.tensors.items()})

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Write it into the folder; returns the file, if there is one.

        Raises:
            OSError: the disk is full or does not let us.
        """
        if self.index >= self.count:
            return []
        path = folder / (f"{stem}.safetensors" if self.count == 1 else f"{stem}-{self.index + 1:05d}-of-{self.count:05d}.safetensors")
        save_tensors(path, self.tensors)
        return [path]


def _named(key: str, names: dict[str, str]) -> str:
    """``name`` or ``moment.name`` under the parameter's name on disk; ``step`` stays."""
    moment, _, name = key.partition(".")
    return names[key] if key in names else f"{moment}.{names[name]}" if name in names else key


def part_files(folder: Path, stem: str) -> list[Path]:
    """The files that :meth:`Part.write` wrote, in order; other files beside them do not count."""
    written = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    return sorted(path for path in folder.glob("*.safetensors") if written.fullmatch(path.name))


def owners(sizes: dict[str, int], ranks: int) -> tuple[dict[str, int], int]:
    """The rank that writes each tensor, and how many ranks write: consecutive tensors together, about equally many bytes each.

    Args:
        sizes: bytes by name.
    """
    total = sum(sizes.values())
    count = max(1, min(ranks, -(-total // FILE_BYTES)))
    owner, before = {}, 0
    for name, size in sizes.items():
        owner[name] = min(count - 1, before * count // max(1, total))
        before += size
    return owner, count


class OptimizerState:
    """A saved optimizer state, read one tensor at a time.

    Args:
        folder: where it lies.
        names: what each parameter is called on disk, by its name in the module; None: the same.
        stem: of its files.

    Raises:
        EngineError: it is unreadable.
    """

    def __init__(self, folder: Path, names: dict[str, str] | None = None, stem: str = "optimizer"):
        self.folder, self._names = folder, names or {}
        self._files: dict[str, Any] = {}  # the open file that holds each tensor
        try:
            for path in part_files(folder, stem):
                file = safe_open(str(path), "pt")
                self._files |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{path} cannot be read: {error}; start anew with checkpoint.resume=false") from None
        self._moments = sorted({key.partition(".")[0] for key in self._files} - {"step"})

    def expect(self, moments: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> None:
        """Make sure that it is the state of some parameters.

        Args:
            moments: what the optimizer keeps for each parameter.
            shapes: the parameters' shapes, by their names in the module.

        Raises:
            EngineError: it is of another optimizer or other parameters.
        """
        wanted = {"step": ()} | {self._key(moment, name): tuple(shape) for moment in moments for name, shape in shapes.items()}
        rested = {self._key("step", name) for name in shapes}
        found = {key: tuple(file.get_slice(key).get_shape()) for key, file in self._files.items() if key not in rested}
        wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if wrong:
            what = f"{self.folder} is of another optimizer or other parameters ({wrong[0]})"
            raise EngineError(f"{what}; start anew with checkpoint.resume=false")

    def steps_taken(self, name: str) -> float:
        """Steps that the optimizer had counted for a parameter (called as in the module)."""
        key = self._key("step", name)
        key = key if key in self._files else "step"
        if key not in self._files:
            raise EngineError(f"{self.folder} lacks {key}: it is damaged; start anew with checkpoint.resume=false")
        return self._files[key].get_tensor(key).item()

    def moments(self, name: str, place: tuple[slice, ...] = ()) -> dict[str, Tensor]:
        """What the optimizer keeps for a parameter (called as in the module), or for a part of it."""
        keys = {moment: self._key(moment, name) for moment in self._moments}
        if missing := [key for key in keys.values() if key not in self._files]:
            raise EngineError(f"{self.folder} lacks {missing[0]}: it is damaged; start anew with checkpoint.resume=false")
        return {moment: self._files[key].get_slice(key)[place or ...].clone() for moment, key in keys.items()}

    def _key(self, moment: str, name: str) -> str:
        return f"{moment}.{self._names.get(name, name)}"


def copied(value: Tensor) -> Tensor:
    """A float32 copy on the CPU."""
    return value.detach().to("cpu", torch.float32, copy=True)
