"""A run's checkpoints: written whole or not at all, linked as ``last`` and ``best``, removed when no longer wanted.

A folder gets its name when everything in it is on the disk; the links are replaced at once. So a killed save leaves the old state or the
new one, and :meth:`RunFolder.tidy` removes what it left half done. :mod:`megalens.checkpoint` tells the layout.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Container, Sequence
from pathlib import Path

from megalens.checkpoint import CheckpointError, finished_checkpoints
from megalens.checkpoint.checksums import check_checkpoint, read_json, sums_of, write_sums
from megalens.files import point, save_json, sync

_CUT_OFF = re.compile(r"\.step-\d{8,}(\.\d+)?\.(unfinished|removed)")
_ANEW = "start anew with checkpoint.resume=false"


class RunFolder:
    """``outputs/<run>``: its checkpoints and the links to the last and the best one.

    Rank 0 keeps it; other ranks only add parts to an unfinished checkpoint. Only folders that a training made are ever removed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        link = self.folder / "last"
        return link.resolve() if (link / "trainer.json").is_file() else None

    def tidy(self) -> str | None:
        """Remove what a killed save left half done, and set the links to what the last checkpoint knows.

        Whole checkpoints stay until the next save: nothing is removed before a training has gone on from the last one.

        Where there are checkpoints but no ``last`` (many tools leave out links as they copy), the newest whole one becomes it, and none is
        removed.

        Returns:
            What a person should know of it.

        Raises:
            CheckpointError: a link is a folder or leads elsewhere, or there are checkpoints of which none is whole.
        """
        self._refuse_what_is_no_link()
        self._sweep()
        last = self.last
        if last is None:
            return self._find_last()
        if not (self.checkpoints / last.name).is_dir():
            mend = f"link it to one of them, start from that lens with init_from, or {_ANEW}"
            raise CheckpointError(f"{self.folder / 'last'} leads to {last}, which is none of the run's checkpoints; {mend}")
        self._point(last.name, self._best(last))
        return None

    def clear(self) -> bool:
        """Forget every checkpoint; True when there were any."""
        self._refuse_what_is_no_link()
        found = bool(finished_checkpoints(self.checkpoints))
        for link in ("last", "best"):
            (self.folder / link).unlink(missing_ok=True)
        self._keep(set())
        return found

    def name(self, step: int, taken: Container[str] = ()) -> str:
        """A folder name that is free for a checkpoint of this micro-step."""
        return self._free(f"step-{step:08d}", taken)

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
        folder = self.unfinished(name)
        sums: dict[str, str] = {}
        for part in (folder / f".part.{rank}" for rank in range(1, ranks)):
            while not part.is_file():
                time.sleep(0.05)
            sums |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        mine = [path for path in _written(folder) if str(path.relative_to(folder)) not in sums]
        write_sums(folder, sums | sums_of(folder, mine))
        for path in [*_written(folder), *{path.parent for path in _written(folder)}]:
            sync(path)
        folder.rename(self.checkpoints / name)
        sync(self.checkpoints)
        self._link(name, best, kept)
        return self.checkpoints / name

    def drop(self, name: str) -> None:
        """Remove what was written of a checkpoint that cannot be finished."""
        shutil.rmtree(self.unfinished(name), ignore_errors=True)

    def _removed(self, name: str) -> Path:
        return self.checkpoints / f".{name}.removed"

    def _free(self, wanted: str, taken: Container[str] = ()) -> str:
        name, again = wanted, 1
        while name in taken or any(os.path.lexists(path) for path in (self.checkpoints / name, self.unfinished(name), self._removed(name))):
            name, again = f"{wanted}.{again}", again + 1
        return name

    def _sweep(self) -> None:
        """Remove what is left of saves and removals that were cut off."""
        for path in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            if _CUT_OFF.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)  # what others put there meanwhile can hold it up; the next save tries again

    def _link(self, last: str, best: Sequence[str], kept: Sequence[str]) -> None:
        self._point(last, best)
        self._keep({last, *best, *kept})

    def _point(self, last: str, best: Sequence[str]) -> None:
        point(self.folder / "last", self.checkpoints / last)
        there = [name for name in best if (self.checkpoints / name).is_dir()]
        if there:
            point(self.folder / "best", self.checkpoints / there[0])

    def _keep(self, names: set[str]) -> None:
        for path in finished_checkpoints(self.checkpoints):
            if path.name not in names:
                os.replace(path, self._removed(path.name))  # never half a checkpoint under a good name
        self._sweep()

    @staticmethod
    def _best(folder: Path) -> list[str]:
        """Names of the best checkpoints, as a checkpoint knows them."""
        path = folder / "trainer.json"
        progress = read_json(path).get("progress")
        if not isinstance(progress, dict):
            raise CheckpointError(f"{path} does not tell where the training stands: copy it anew, or {_ANEW}")
        try:
            return [str(name) for _, name in progress.get("best", [])]
        except (TypeError, ValueError):
            raise CheckpointError(f"{path} lists the best checkpoints as no training does: copy it anew, or {_ANEW}") from None

    def _find_last(self) -> str | None:
        """Link to the newest whole checkpoint, where there is no last one; tells which, and what was passed over."""
        damaged: dict[Path, str] = {}
        for path in reversed(finished_checkpoints(self.checkpoints)):
            try:
                for name in ("trainer.json", "lens.json"):
                    if not (path / name).is_file():
                        raise CheckpointError(f"{path / name} is missing")
                check_checkpoint(path)
                best = self._best(path)
            except CheckpointError as error:
                damaged[path] = str(error).partition(";")[0]
                continue
            for newer in damaged:
                newer.rename(self.checkpoints / self._free(f"{newer.name}.damaged"))
            self._point(path.name, best)
            aside = "".join(f"; {newer.name} is set aside as damaged: {problem}" for newer, problem in damaged.items())
            return f"{self.folder} has no link `last`: going on from its newest whole checkpoint, {path.name}{aside}"
        if damaged:
            mend = f"copy the run anew from where it is whole, or {_ANEW}"
            problem = next(iter(damaged.values()))
            raise CheckpointError(f"{self.folder} has no link `last`, and none of its checkpoints is whole: {problem}; {mend}")
        return None

    def _refuse_what_is_no_link(self) -> None:
        """Refuse a run whose links have become folders, as a copy that follows links makes them."""
        wrong = [path for path in (self.folder / "last", self.folder / "best") if path.exists() and not path.is_symlink()]
        if not wrong:
            return
        moves = [f"mkdir -p {shlex.quote(str(self.checkpoints))}"]
        taken: list[str] = []
        for path in wrong:
            target = path.with_name(f"{path.name}.moved")
            with contextlib.suppress(CheckpointError, KeyError, TypeError):
                taken.append(self.name(read_json(path / "trainer.json")["progress"]["step"], taken))
                target = self.checkpoints / taken[-1]
            moves.append(f"mv {shlex.quote(str(path))} {shlex.quote(str(target))}")
        what = " and ".join(str(path) for path in wrong) + (" is" if len(wrong) == 1 else " are")
        raise CheckpointError(f"{what} no link into checkpoints/, as after a copy that follows links; mend it with `{' && '.join(moves)}`")


def _written(folder: Path) -> list[Path]:
    """The files that a save has written; others may have come beside them."""
    found = (path for pattern in ("*.safetensors", "*.json", "engine/*.safetensors") for path in folder.glob(pattern))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
