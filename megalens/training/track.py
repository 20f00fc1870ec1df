"""Where a training's figures go: W&B (offline by default), ``metrics.jsonl`` in the run's folder, and the console."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from tqdm import tqdm

from megalens.checkpoint.run_folder import RunFolder
from megalens.config import Config, config_to_dict
from megalens.schedule import Clock
from megalens.training.progress import Progress

_LINE_EVERY = 5.0  # seconds between two progress lines where there is no terminal


class TrackingError(ValueError):
    """W&B could not be started. The message is one line and names the mend."""


class Curve:
    """``metrics.jsonl``: one JSON object per line, ``step`` and the figures logged there.

    Args:
        path: the file.
        lines: how many of its lines are kept; what a killed run wrote after its last save is cut off.
    """

    def __init__(self, path: Path, lines: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes().splitlines(keepends=True)[:lines] if path.exists() else []
        with path.open("wb") as file:
            file.writelines(kept)
        self.lines = len(kept)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        self.lines += 1

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def read_curve(path: str | Path) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``; an empty list where there is no file. A line that a kill cut short is left out."""
    if not Path(path).is_file():
        return []
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


class Console:
    """Progress: a bar on a terminal; elsewhere a line every few seconds.

    Args:
        name: shown before the figures.
        total, done: micro-steps in all, and those behind us.
    """

    def __init__(self, name: str, total: int, done: int):
        self.total, self._shown = total, 0.0
        self._notes: dict[str, float] = {}
        self._name, self._done, self._bar = name, done, None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=name, unit="step", dynamic_ncols=True)

    def advance(self, step: int, **notes: float) -> None:
        """The training is at micro-step ``step``; ``notes`` (loss, fve, ...) are shown until replaced."""
        self._notes |= notes
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in self._notes.items()}, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step > self._done and (time.monotonic() - self._shown > _LINE_EVERY or step == self.total):
            self._shown = time.monotonic()
            self.say(f"{self._name} {step}/{self.total} " + " ".join(f"{name} {value:.4g}" for name, value in self._notes.items()))
        self._done = step

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the terminal as it should be."""
        if self._bar is not None:
            self._bar.close()


class Tracker:
    """The run in W&B; does nothing when ``wandb.mode`` is ``disabled``.

    Args:
        config: the run's configuration; all of it is logged (it holds no secret).
        run_id: the W&B run to resume; None: a new one, or the one that a sweep's agent names.

    Attributes:
        run_id: the run's id, to be kept for a resume; None when disabled.

    Raises:
        TrackingError: W&B does not start.
    """

    def __init__(self, config: Config, run_id: str | None = None):
        self.run_id: str | None = run_id
        self._config, self._run, self._is_lost = config, None, False
        if config.wandb.mode != "disabled":
            self._run = _start(config, run_id or os.environ.get("WANDB_RUN_ID"))
            self.run_id = self._run.id

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures at a micro-step."""
        with self._unless_lost():
            if self._run is not None:
                self._run.log({**figures, "step": step})

    def examples(self, step: int, examples: list[dict[str, Any]]) -> None:
        """A table of sample explanations."""
        with self._unless_lost():
            if self._run is not None and examples:
                import wandb

                columns = list(examples[0])
                self._run.log({"val/examples": wandb.Table([*columns], [[row[c] for c in columns] for row in examples]), "step": step})

    def close(self, exit_code: int = 0) -> None:
        """Finish the run. When Slurm ended a sweep's trial with its job, ask W&B to hand the trial out again."""
        preempted = sweep_id() is not None and "SLURM_JOB_ID" in os.environ and exit_code == 128 + signal.SIGTERM
        with self._unless_lost():
            self._finish(exit_code, preempted)
        if self._is_lost and preempted:
            self._run = _start(self._config, self.run_id)
            self._finish(exit_code, preempted)

    def _finish(self, exit_code: int, preempted: bool) -> None:
        if self._run is not None:
            if preempted:
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_code)

    @contextmanager
    def _unless_lost(self) -> Iterator[None]:
        """Let the training go on when W&B's service is gone: Slurm sends SIGTERM to every process of a job, to that one too."""
        if self._run is None:
            yield
            return
        import wandb
        from wandb.sdk.mailbox import MailboxClosedError

        try:
            yield
        except (ConnectionError, MailboxClosedError):
            print("warning: W&B's service has ended; figures go on in metrics.jsonl, and to W&B when the run is resumed", file=sys.stderr)
            self._run, self._is_lost = None, True
            with suppress(ConnectionError, MailboxClosedError):
                wandb.teardown()


def _start(config: Config, run_id: str | None):
    import wandb

    folder = config.run_dir / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    online = config.wandb.mode == "online"
    try:
        run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=config.run_name,
            id=run_id,
            resume="allow" if online else None,
            mode=cast(Literal["online", "offline"], config.wandb.mode),
            dir=str(config.run_dir),
            config=config_to_dict(config),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrackingError(f"W&B does not start ({reason}); log in with `wandb login`, or set wandb.mode=offline") from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


@dataclass
class Run:
    """What a training writes to. The folder is on every rank, the rest on rank 0 only."""

    folder: RunFolder
    curve: Curve | None = None
    tracker: Tracker | None = None
    console: Console | None = None

    @classmethod
    def open(cls, config: Config, folder: RunFolder, progress: Progress, clock: Clock) -> Run:
        """For rank 0: continue curve and W&B run from where ``progress`` stands."""
        curve = Curve(config.run_dir / "metrics.jsonl", progress.curve_lines)
        tracker = Tracker(config, progress.wandb_run)
        progress.wandb_run = tracker.run_id
        return cls(folder, curve, tracker, Console(config.run_dir.name, clock.last_step, progress.step))

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures at a micro-step."""
        if self.curve is not None:
            self.curve.log(step, figures)
        if self.tracker is not None:
            self.tracker.log(step, figures)

    def show_examples(self, step: int, examples: list[dict[str, Any]]) -> None:
        """Sample explanations at a micro-step."""
        if self.tracker is not None:
            self.tracker.examples(step, examples)

    def sync(self) -> int:
        """Wait until the curve is on the disk; return the number of its lines."""
        if self.curve is None:
            return 0
        self.curve.sync()
        return self.curve.lines

    def show(self, step: int, **notes: float) -> None:
        """Show progress."""
        if self.console is not None:
            self.console.advance(step, **notes)

    def say(self, text: str) -> None:
        """Print a line for the person who watches."""
        if self.console is not None and text:
            self.console.say(text)

    def close(self, exit_code: int) -> None:
        """Close console, W&B run and curve."""
        if self.console is not None:
            self.console.close()
        if self.tracker is not None:
            self.tracker.close(exit_code)
        if self.curve is not None:
            self.curve.close()


def sweep_id() -> str | None:
    """The id of the W&B sweep that this process is a trial of; None where it is of none."""
    return os.environ.get("WANDB_SWEEP_ID") or None
