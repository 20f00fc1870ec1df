"""AdamW's state on disk: one safetensors file, by parameter name, whole and float32, whatever engine and however many ranks wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalens.engine.base import EngineError
from megalens.engine.files import save_tensors

FILE = "adamw.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_adam_state(folder: Path, step: float, moments: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
    """Write the number of steps taken and the moments (``exp_avg``, ``exp_avg_sq``) of each parameter name."""
    tensors = {f"{key}.{name}": value for name, state in moments for key, value in state.items()}
    save_tensors(folder / FILE, {"step": torch.tensor(float(step)), **tensors})


class AdamState:
    """A saved state, read one parameter at a time.

    Args:
        folder: where it lies.
        shapes: the shapes of the parameters that want it.

    Raises:
        EngineError: it is unreadable, or of other parameters.
    """

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]]):
        path = folder / FILE
        try:
            self._file = safe_open(str(path), "pt")
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{path} can not be read: {error}; start anew with checkpoint.resume=false") from None
        found = set(self._file.keys())
        wanted = {"step"} | {f"{key}.{name}" for key in MOMENTS for name in shapes}
        wrong = sorted(found ^ wanted) or [n for n in shapes if tuple(self._file.get_slice(f"exp_avg.{n}").get_shape()) != tuple(shapes[n])]
        if wrong:
            raise EngineError(f"{path} is of other parameters ({wrong[0]}); start anew with checkpoint.resume=false")
        self.step = self._file.get_tensor("step").item()

    def moments(self, name: str) -> dict[str, Tensor]:
        """``exp_avg`` and ``exp_avg_sq`` of a parameter."""
        return {key: self._file.get_tensor(f"{key}.{name}") for key in MOMENTS}
