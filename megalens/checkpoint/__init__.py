"""What a training leaves on the disk, and how a lens is read back.

::

    outputs/<run>/checkpoints/step-00000120/
        lens.safetensors     the lens' weights, float32, under the names of megalens.lens.names; no engine is needed to read them
        lens.json            what the lens is: format, configuration, subject's fingerprint, versions
        stats.safetensors    statistics of the training activations, mean and variance that the lens standardises by
        trainer.json         where the training stands
        reference.safetensors
                             the verbalizer as it was when the training began; only where terms.reference_kl has a weight
        engine/optimizer.safetensors
                             the optimizer's state: step, exp_avg.<name> and exp_avg_sq.<name>
        checksums.json       xxh3_64 of every other file
    outputs/<run>/last, best    relative links into it

Large weights and states lie in several files, ``lens-00001-of-00004.safetensors`` and so on, each written by another rank.

Only folders called ``step-*`` (and, of saves that were cut off, ``.step-*.unfinished`` and ``.step-*.removed``) are a training's own;
whatever else lies in ``checkpoints/`` or in a checkpoint is neither touched nor read. Nothing that is read back is executed.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is one line and names the mend."""


def finished_checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints in ``outputs/<run>/checkpoints``, the oldest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return [path for _, _, path in sorted((int(name[1]), int(name[2] or 0), path) for name, path in found if name)]
