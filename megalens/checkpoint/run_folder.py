"""Checkpoints: a folder that holds a lens, and what a training needs to go on from it.

::

    outputs/<run>/checkpoints/step-00000120/
        lens.safetensors     the lens' weights, float32; no engine is needed to read them
        lens.json            what the lens is: format, configuration, subject's fingerprint, versions
        stats.safetensors    mean, var and mean_normalised of the training activations
        trainer.json         where the training stands
        engine/              the optimizer's state
        checksums.json       xxh3_64 of every other file
    outputs/<run>/last, best    relative links into it

Large weights and states lie in several files, lens-00001-of-00004.safetensors and so on, each written by another rank.

A folder gets its name when everything in it is on the disk; the links are replaced at once. So a killed save leaves the old state or the
new one, and :meth:`RunFolder.tidy` removes what it left half done. Nothing that is read back is executed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from megalens.checkpoint.checksums import CHECKSUMS, read_json, sums_of
from megalens.files import point, save_json, sync, sync_tree

# -------------------------------------------------------------------------------------------------------------- the lens


# ------------------------------------------------------------------------------------------------------------- checksums


# ------------------------------------------------------------------------------------------------------ a run's folder


class RunFolder:
    """``outputs/<run>``: its checkpoints and the links to the last and the best one.

    Rank 0 keeps it; other ranks only add parts to an unfinished checkpoint.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        link = self.folder / "last"
        return link.resolve() if (link / "trainer.json").is_file() else None

    def tidy(self) -> None:
        """Remove what a killed save left, and set the links to what the last checkpoint knows."""
        if not self.checkpoints.is_dir():
            return
        if self.last is None:
            self._keep(set())
        else:
            progress = read_json(self.last / "trainer.json")["progress"]
            names = [[name for _, name in progress.get(key, [])] for key in ("best", "kept")]
            self._link(self.last.name, *names)

    def clear(self) -> bool:
        """Forget every checkpoint; True when there were any."""
        found = self.last is not None
        for link in ("last", "best"):
            (self.folder / link).unlink(missing_ok=True)
        if self.checkpoints.is_dir():
            self._keep(set())
        return found

    def name(self, step: int) -> str:
        """A folder name that is free for a checkpoint of this micro-step."""
        name, again = f"step-{step:08d}", 1
        while (self.checkpoints / name).exists():
            name, again = f"step-{step:08d}.{again}", again + 1
        return name

    def unfinished(self, name: str) -> Path:
        """Where a checkpoint's files are written."""
        return self.checkpoints / f".{name}.unfinished"

    def begin(self, name: str) -> Path:
        """Make that folder."""
        self.unfinished(name).mkdir(parents=True)
        return self.unfinished(name)

    def add_part(self, name: str, rank: int, paths: list[Path]) -> None:
        """For a rank that has written files of the checkpoint: they are complete."""
        folder = self.unfinished(name)
        for path in paths:
            sync(path)
        save_json(folder / f".part.{rank}.new", sums_of(folder, paths))
        (folder / f".part.{rank}.new").rename(folder / f".part.{rank}")

    def finish(self, name: str, best: list[str], kept: Sequence[str] = (), ranks: int = 1) -> Path:
        """Make what was written a checkpoint, and the last one.

        Args:
            best: names of the best checkpoints, the best first.
            kept: names of those that stay for good; all others but this one are removed.
            ranks: how many write it; the parts of all but rank 0 are waited for.
        """
        folder, sums = self.unfinished(name), {}
        for part in (folder / f".part.{rank}" for rank in range(1, ranks)):
            while not part.is_file():
                time.sleep(0.05)
            sums |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        sums |= sums_of(folder, (path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in sums))
        # Without a blank, so that no byte can change and mean the same.
        (folder / CHECKSUMS).write_text(json.dumps(dict(sorted(sums.items())), separators=(",", ":")), encoding="utf-8")
        sync_tree(folder)
        folder.rename(self.checkpoints / name)
        sync(self.checkpoints)
        self._link(name, best, kept)
        return self.checkpoints / name

    def drop(self, name: str) -> None:
        """Remove what was written of a checkpoint that can not be finished."""
        shutil.rmtree(self.unfinished(name), ignore_errors=True)

    def _link(self, last: str, best: list[str], kept: Sequence[str]) -> None:
        point(self.folder / "last", self.checkpoints / last)
        if best:
            point(self.folder / "best", self.checkpoints / best[0])
        self._keep({last, *best, *kept})

    def _keep(self, names: set[str]) -> None:
        for path in self.checkpoints.iterdir():
            if path.name not in names:
                doomed = path
                if not path.name.startswith("."):  # never half a checkpoint under a good name
                    doomed = path.with_name(f".{path.name}.removed")
                    os.replace(path, doomed)
                shutil.rmtree(doomed)
