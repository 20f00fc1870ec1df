"""Weights and optimizer state on disk: whole float32 tensors by parameter name, whatever engine and however many ranks wrote them.

What fits into one file of :data:`FILE_BYTES` is one, written by rank 0; more is divided over as many ranks as there are such files, so that
no rank ever holds or writes the whole of a large state. Any number of ranks of any engine reads it back, one tensor at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalens.files import save_tensors

FILE_BYTES = 4 * 2**30
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}  # what an optimizer keeps for each parameter


class EngineError(ValueError):
    """The training can not be run as asked. The message is one line and names the mend."""


@dataclass
class Part:
    """A rank's share of a set of tensors, on the CPU: ``index`` of ``count``; a rank whose index is not below ``count`` has none."""

    tensors: dict[str, Tensor]
    index: int = 0
    count: int = 1

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
        moments: what the optimizer keeps for each parameter.
        shapes: the shapes of the parameters that want it.

    Raises:
        EngineError: it is unreadable, or of another optimizer or other parameters.
    """

    def __init__(self, folder: Path, moments: tuple[str, ...], shapes: dict[str, tuple[int, ...]]):
        self.names, self._files = moments, {}
        try:
            for path in sorted(folder.glob("optimizer*.safetensors")):
                file = safe_open(str(path), "pt")
                self._files |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{path} can not be read: {error}; start anew with checkpoint.resume=false") from None
        wanted = {"step": ()} | {f"{key}.{name}": tuple(shape) for key in moments for name, shape in shapes.items()}
        found = {key: tuple(file.get_slice(key).get_shape()) for key, file in self._files.items()}
        wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if wrong:
            raise EngineError(f"{folder} is of another optimizer or other parameters ({wrong[0]}); start anew with checkpoint.resume=false")
        self.step = self._files["step"].get_tensor("step").item()

    def moments(self, name: str, place: tuple[slice, ...] = ()) -> dict[str, Tensor]:
        """What the optimizer keeps for a parameter, or for a part of it."""
        return {key: self._files[f"{key}.{name}"].get_slice(f"{key}.{name}")[place or ...].clone() for key in self.names}


def copied(value: Tensor) -> Tensor:
    """A float32 copy on the CPU."""
    return value.detach().to("cpu", torch.float32, copy=True)
