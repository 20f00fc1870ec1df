"""What a format of saved lenses is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megalens.config import Config
from megalens.statistics import ActivationStatistics

if TYPE_CHECKING:
    from megalens.lens.lens import ConsistencyLens


@dataclass(frozen=True)
class LoadedLens:
    """A lens ready to use (``lens.eval()``), and the statistics of the activations it was trained on."""

    lens: ConsistencyLens
    statistics: ActivationStatistics


class Format(Protocol):
    """A way in which lenses lie on the disk. Another one is a class of these five, listed in ``FORMATS``.

    Attributes:
        name: for messages.
        looked_for: the file or files by which a folder is known, for the refusal of a folder of no format.
    """

    name: str
    looked_for: str

    def detect(self, folder: Path) -> bool:
        """Is the folder of this format, as far as its files' names tell?"""
        ...

    def read_config(self, folder: Path, arguments: Sequence[str] = (), **changes: Any) -> Config:
        """The configuration that the lens was trained with; ``trust_remote_code`` is never taken from the folder.

        Args:
            arguments: ``key=value`` that are other here.
            changes: the same as keywords.

        Raises:
            CheckpointError: it is damaged, or of another version.
            ConfigError: a value is refused.
        """
        ...

    def load(self, folder: Path, **changes: Any) -> LoadedLens:
        """Load a lens.

        Args:
            changes: configuration keys that are other here. Code that comes with the subject runs only where
                ``trust_remote_code`` is among them, whatever the folder says.

        Raises:
            CheckpointError: it is damaged, or the subject is not the model it was trained on; nothing of the model is loaded then.
            ConfigError: the subject cannot be loaded, or the weights do not fit it.
        """
        ...

    def save(self, folder: Path, loaded: LoadedLens) -> None:
        """Write a lens into a folder, which is made where it is not there.

        Raises:
            OSError: the disk is full or does not let us.
        """
        ...
