"""Running a sweep's trials without a server: each is a training of its own, started as W&B's agent would start it.

Early termination stops a training at each look (``early_termination.steps``), decides, and lets it go on from its checkpoint: what a
trial spends is decided by the file and not by how fast somebody watches.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from optuna.trial import TrialState
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from megalens.config import Config
from megalens.data.source import training_loader
from megalens.device import resolve_device
from megalens.schedule import duration_steps, duration_text, parse_duration
from megalens.sweep import SweepError
from megalens.sweep.file import SweepFile
from megalens.sweep.search import Claim, Search
from megalens.sweep.trial import OFFLINE, outside_the_sweep
from megalens.training.progress import clock_of
from megalens.training.ready import check_ready
from megalens.training.signals import end_with_parent, leave_dead_terminal, stop, stopping
from megalens.training.track import read_curve

_GLANCE = 2.0  # seconds between looks at what a new trial logs
_FAILURES = 3  # so many failed trials and not one that ended: the fault is not the parameters'


class Stopped(Exception):
    """A signal has asked the sweep to stop; its trials are left to the next call."""


def check_sweep(sweep: SweepFile) -> None:
    """Refuse a sweep whose trials could not start.

    Raises:
        SweepError: its program is missing.
        ValueError: another of ours: no such GPU, no model, no activations; each names its mend.
    """
    if not Path(sweep.program).is_file():
        raise SweepError(f"program: {sweep.program} does not exist here; run this in the repository's folder")
    config = sweep.config(first_point(sweep))
    if Path(sweep.program).name == "train.py":  # the pipeline makes what is missing
        check_ready(config)
    else:
        resolve_device(config.device)


def first_point(sweep: SweepFile) -> dict:
    """Some values of the searched keys."""
    return {key: values[0] for key, values in sweep.choices.items()} | {key: numbers.samples()[0] for key, numbers in sweep.ranges.items()}


def run_name(sweep: SweepFile, number: int) -> str:
    """The folder of a trial's run under outputs/."""
    return f"{sweep.name}-{number:03d}"


def trial_config(sweep: SweepFile, number: int, point: dict) -> Config:
    """A trial's configuration."""
    return sweep.config({**point, "run_name": run_name(sweep, number)})


class Workers:
    """Works at a sweep's trials until all have ended, several at a time.

    Args:
        search: the sweep.
        jobs: trials at a time; each has a share of the GPUs and cores.
        said: takes lines for the person who watches.
        ended: called after each trial, by one worker at a time.
    """

    def __init__(self, search: Search, jobs: int, said: Callable[[str], None], ended: Callable[[], None]):
        self.search, self.sweep, self.jobs, self.say, self.ended = search, search.sweep, jobs, said, ended
        self.stopped_by: int | None = None
        self._stop = threading.Event()
        self._running: set[subprocess.Popen] = set()
        self._turn = threading.Lock()

    def run(self) -> int:
        """Run to the end of the sweep; returns the exit code.

        Raises:
            SweepError: trial after trial fails.
        """
        before = {number: signal.signal(number, self._on_signal) for number in stopping()}
        with ThreadPoolExecutor(self.jobs) as pool:
            works = [pool.submit(self._work, slot) for slot in range(self.jobs)]
            while waiting := wait(works, timeout=0.2, return_when=FIRST_EXCEPTION).not_done:
                if any(work.exception() for work in works if work not in waiting):
                    self._end_all()
        for number, handler in before.items():
            signal.signal(number, handler)
        for work in works:
            work.result()
        return 128 + self.stopped_by if self.stopped_by else 0

    def _on_signal(self, number: int, _frame) -> None:
        leave_dead_terminal()
        self.stopped_by = number
        self._end_all()

    def _end_all(self) -> None:
        self._stop.set()
        for process in list(self._running):
            stop(process, signal.SIGTERM)

    def _work(self, slot: int) -> None:
        try:
            while not self._stop.is_set():
                claim = self.search.claim()
                if claim is not None:
                    self._try(claim, slot)
                    with self._turn:
                        self.ended()
                elif self.search.is_over():
                    return
                else:
                    self._stop.wait(0.5)  # others are at work; take over should they die
        except Stopped:
            pass

    def _try(self, claim: Claim, slot: int) -> None:
        """Work at a trial until it has ended, or until a signal."""
        try:
            shown = " ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in claim.point.items())
            self.say(f"trial {claim.number}: {shown}")
            state, value = self._train(claim, slot)
            claim.end(state, value)
            how = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed"}[state]
            self.say(f"trial {claim.number}: {how}" + ("" if value is None else f", {self.sweep.metric} {value:.6g}"))
            if state == TrialState.FAIL:
                self._give_up_after_failures(claim)
        finally:
            claim.leave()

    def _train(self, claim: Claim, slot: int) -> tuple[TrialState, float | None]:
        log = self.search.folder / f"trial-{claim.number}.log"
        for look, until in self._looks(claim):
            settings = {"run_name": run_name(self.sweep, claim.number)} | ({"early_termination.steps": until} if until else {})
            code = self._start(claim, slot, settings, log)
            if self._stop.is_set():
                raise Stopped
            if code:
                claim.note("error", _last_error(log))
                return TrialState.FAIL, None
            value = self.value(claim)
            if value is None:
                self._check_measured(claim, at_end=True)
                claim.note("error", f"{self.sweep.metric} is not finite")
                return TrialState.FAIL, None
            if until and not self._is_at_end(claim, until) and claim.is_hopeless(look, value):
                return TrialState.PRUNED, value
            if until and self._is_at_end(claim, until):
                break
        return TrialState.COMPLETE, value

    def _looks(self, claim: Claim) -> Iterator[tuple[int, str | None]]:
        """(how many values of the metric, the duration until then) of each look, and (0, None) for the whole training."""
        halving = self.sweep.halving
        if halving is None:
            yield 0, None
            return
        config = trial_config(self.sweep, claim.number, claim.point)
        interval = config.validation.interval if self.sweep.metric.startswith("val/") else config.log_interval
        number, unit = parse_duration(interval)
        look = halving.min_iter
        while True:
            yield look, duration_text(number * look, unit)
            look *= halving.eta

    def _is_at_end(self, claim: Claim, until: str) -> bool:
        config = trial_config(self.sweep, claim.number, claim.point)
        clock = clock_of(config, training_loader(config).steps_per_epoch)
        return duration_steps(until, clock) >= clock.last_step

    def value(self, claim: Claim) -> float | None:
        """The last value of the sweep's metric that a trial has logged."""
        lines = read_curve(trial_config(self.sweep, claim.number, claim.point).run_dir / "metrics.jsonl")
        values = [line[self.sweep.metric] for line in lines if self.sweep.metric in line]
        return values[-1] if values and math.isfinite(values[-1]) else None

    def _start(self, claim: Claim, slot: int, settings: dict[str, str], log: Path) -> int:
        """Run the training's command, as W&B's agent would; its exit code."""
        command = command_of(self.sweep, claim.point | settings)
        with log.open("ab") as output, self._turn:
            if self._stop.is_set():
                raise Stopped
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                env=self._environment(claim, slot),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,
                pass_fds=[claim.lock.fileno()],  # the trial is taken until the training, too, is gone
            )
            self._running.add(process)
        try:
            return self._await(process, claim)
        finally:
            self._running.discard(process)

    def _await(self, process: subprocess.Popen, claim: Claim) -> int:
        """The exit code of a training. One that does not measure the metric is stopped as soon as that shows.

        Raises:
            SweepError: it does not.
        """
        measured = False
        while True:
            try:
                return process.wait(_GLANCE if not measured else None)
            except subprocess.TimeoutExpired:
                try:
                    measured = self._check_measured(claim)
                except SweepError:
                    stop(process, signal.SIGTERM)
                    process.wait()
                    raise

    def _check_measured(self, claim: Claim, at_end: bool = False) -> bool:
        """Is the metric among the figures that a trial has logged? False: none of its kind are there yet.

        Raises:
            SweepError: others of its kind (``val/...``) are there, or the trial has ended, and it is not.
        """
        lines = read_curve(trial_config(self.sweep, claim.number, claim.point).run_dir / "metrics.jsonl")
        logged, kind = {key for line in lines for key in line}, self.sweep.metric.partition("/")[0]
        if self.sweep.metric in logged:
            return True
        if not at_end and not any(key.startswith(f"{kind}/") for key in logged):
            return False
        there = ", ".join(sorted(key for key in logged if "/" in key)) or "none"
        mend = f"mend metric.name, remove {self.search.folder}, and start again"
        raise SweepError(f"metric.name: {self.sweep.metric} is not among the figures that trial {claim.number} logs ({there}); {mend}")

    def _environment(self, claim: Claim, slot: int) -> dict[str, str]:
        """The trial's W&B run, its share of the GPUs and of the cores."""
        environment = outside_the_sweep() | {"WANDB_RUN_ID": claim.wandb_run, "WANDB_RUN_GROUP": self.sweep.name}
        environment[OFFLINE] = self.search.unique_name()
        if gpus := visible_gpus():
            share = max(1, len(gpus) // self.jobs)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(slot * share + i) % len(gpus)] for i in range(share))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        return environment

    def _give_up_after_failures(self, claim: Claim) -> None:
        trials = self.search.trials()
        failed = [t for t in trials if t.state == TrialState.FAIL and "error" in t.user_attrs]
        if len(failed) >= _FAILURES and not any(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials):
            log = self.search.folder / f"trial-{claim.number}.log"
            mend = f"mend it, remove {self.search.folder}, and start again"
            raise SweepError(f"the first {len(failed)} trials failed, the last with: {failed[-1].user_attrs['error']} (see {log}); {mend}")


def command_of(sweep: SweepFile, settings: dict) -> list[str]:
    """The command of a training with these settings beside the file's fixed ones."""
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in {**sweep.fixed, **settings}.items()}})
    arguments |= {"interpreter": [sys.executable], "program": [sweep.program], "env": ["/usr/bin/env"]}
    parts = create_sweep_command(list(sweep.command))
    return [text for part in parts for text in (arguments.get(part[2:-1], []) if part.startswith("${") and part.endswith("}") else [part])]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name not in ("", "-1")]
    return [str(i) for i in range(torch.cuda.device_count())]


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), lines[-1])[:500]
