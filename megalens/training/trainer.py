"""The training loop: validate, save, stop or step, each when it is due.

Sample order, noise, schedules and learning rate are functions of the micro-step. So a training that was killed resumes from its last
checkpoint and computes what it would have computed without the kill.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from functools import partial
from itertools import islice
from typing import Any

import torch

from megalens.batch import Batch
from megalens.checkpoint.formats.megalens import save_lens
from megalens.config import Config
from megalens.data.loader import ActivationLoader
from megalens.engine.base import Engine
from megalens.engine.state import Part
from megalens.files import save_json
from megalens.lens.lens import ConsistencyLens
from megalens.lens.names import GROUPS, stable_names
from megalens.objective import Step
from megalens.schedule import duration_steps, lr_factor
from megalens.statistics import ActivationStatistics
from megalens.training.background import Background
from megalens.training.gates import Watch
from megalens.training.progress import TRAINER_VERSION, Progress, TrainingError, clock_of, first_not_finite
from megalens.training.signals import StopSignals
from megalens.training.track import Run
from megalens.training.validate import Validator, examples_table
from megalens.training.watchdog import Watchdog

SKIPS_IN_A_ROW = 50
GRACE_SECONDS = 30.0  # for a save to be finished when the training fails


class Trainer:
    """One training.

    Args:
        config: its configuration.
        engine: changes the weights.
        lens: the module inside the engine.
        loader: batches of this rank.
        validator: measures on held-out rows.
        statistics: of the training activations, kept in every checkpoint.
        progress: where it stands; a fresh one, or a checkpoint's.
        identity: what a resume must find unchanged; kept in ``trainer.json``.
        run: what it writes.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        lens: ConsistencyLens,
        loader: ActivationLoader,
        validator: Validator,
        statistics: ActivationStatistics,
        progress: Progress,
        identity: dict,
        run: Run,
    ):
        self.config, self.engine, self.lens, self.loader = config, engine, lens, loader
        self.validator, self.statistics, self.progress, self.identity, self.run = validator, statistics, progress, identity, run
        self.clock = clock_of(config, loader.steps_per_epoch)
        self.intervals = {
            "log": duration_steps(config.log_interval, self.clock),
            "validate": duration_steps(config.validation.interval, self.clock),
            "save": duration_steps(config.checkpoint.save_interval, self.clock),
        }
        keep_every = config.checkpoint.keep_every
        self.intervals["keep"] = duration_steps(keep_every, self.clock) if keep_every else sys.maxsize
        self._saving, self._gates = Background(), Watch(config.gates)
        self._logged, self._since = progress.step, time.monotonic()
        self._examples: list[dict[str, Any]] = []
        self._saved_validation = progress.validated if progress.saved >= 0 else None

    def fit(self) -> int | None:
        """Train to the end, or until a signal.

        Returns:
            None at the end; the number of the signal that stopped it, after a save.
        """
        try:
            return self._fit()
        finally:
            self._saving.settle(GRACE_SECONDS)  # after an error: let a save that is being written be finished

    def _fit(self) -> int | None:
        batches = self.loader.batches(start_step=self.progress.step)
        with StopSignals() as signals, Watchdog(self.config.stall_seconds) as watchdog:
            while True:
                watchdog.at(f"micro-step {self.progress.step}")
                stop = max(self.engine.gather(signals.received or 0)) if self.engine.any(signals.received is not None) else 0
                at_end = self.progress.step >= self.clock.last_step
                improved = not stop and self._validate_if_due(at_end)
                watchdog.at(f"micro-step {self.progress.step}, validated")
                self._save_if_due(bool(stop) or at_end or improved)
                if stop or at_end:
                    self._saving.wait()
                    self.engine.barrier()  # a launcher ends the others when the first is gone, and they may still be writing
                    break
                self._saving.check()
                self._step(list(islice(batches, self.clock.steps_per_update)))
        batches.close()
        if not stop:
            self.run.say(examples_table(self._examples))
        return stop or None

    # ------------------------------------------------------------------------------------------------------------ steps

    def _step(self, batches: list[Batch]) -> None:
        step = self.progress.step
        torch.manual_seed(((self.config.seed << 40) + (step << 12) + self.engine.data_rank) % 2**63)  # dropout, the same after a resume
        at = self._at(step)
        self.engine.set_rates(self._rates(step, at))
        rollouts = self.engine.sample(batches, at)
        for _ in range(1 if rollouts is None else self.config.rollouts.inner_steps):
            metrics = self.engine.train_step(batches, at, rollouts)
            if metrics["skipped"]:
                break
        self.progress.step += self.clock.steps_per_update
        if metrics.pop("skipped"):
            self._skip(metrics)
        else:
            self.progress.skipped_in_a_row = 0
            for name, value in metrics.items():
                self.progress.window[name] = self.progress.window.get(name, 0.0) + value
            self.progress.window_size += 1
        self._log_if_due(step)
        self.run.show(self.progress.step, loss=metrics["loss"])

    def _at(self, step: int) -> Step:
        return Step.at(self.config, step, self.clock)

    def _rates(self, step: int, at: Step) -> dict[str, float]:
        """The learning rate of each of the lens' groups."""
        rate = self.config.learning_rate * lr_factor(self.config.lr_scheduler, step, self.clock)
        return {group: rate * at.values[f"lr_multipliers.{group}"] for group in GROUPS}

    def _skip(self, metrics: dict[str, float]) -> None:
        p = self.progress
        p.skipped += 1
        p.skipped_in_a_row += 1
        update = p.step // self.clock.steps_per_update
        self.run.say(f"warning: optimizer step {update} skipped: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")
        if p.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise TrainingError(
                f"{SKIPS_IN_A_ROW} optimizer steps in a row had a loss or gradient that was not finite, or a gradient norm beyond "
                f"grad_limit={self.config.grad_limit:g}; lower learning_rate, raise grad_limit, or find the place with detect_anomaly=true"
            )

    def _log_if_due(self, step: int) -> None:
        """``step`` is the micro-step at which the optimizer step just taken began."""
        p = self.progress
        if not (_crossed(self.intervals["log"], step, p.step) or p.step == self.clock.last_step) or not p.window_size:
            return
        figures = {f"train/{name}": value / p.window_size for name, value in p.window.items()}
        at, now = self._at(step), time.monotonic()
        figures |= {
            "train/learning_rate": self.config.learning_rate * lr_factor(self.config.lr_scheduler, step, self.clock),
            "train/tau": at.values["gumbel_tau_schedule"],
            "train/alpha": at.values["alpha_schedule"],
            "train/epoch": p.step / self.clock.steps_per_epoch,
            "train/skipped": p.skipped,
            "perf/samples_per_second": (p.step - self._logged) * self.config.batch_size / max(now - self._since, 1e-9),
        } | self._traffic((p.step - self._logged) // self.clock.steps_per_update)
        self._logged, self._since = p.step, now
        p.window, p.window_size = {}, 0
        self.run.log(p.step, figures)
        for line in self._gates(figures):
            self.run.say(line)

    def _traffic(self, updates: int) -> dict[str, float]:
        """Collectives and their megabytes, per optimizer step since the last log; empty where the engine counts none."""
        calls, size = self.engine.traffic.take()
        return {"perf/collectives": calls / updates, "perf/collective_mb": size / updates / 2**20} if calls else {}

    # ------------------------------------------------------------------------------------------- validating and saving

    def _validate_if_due(self, at_end: bool) -> bool:
        """Validate at the start, after each interval and at the end. Return whether the model is now among the best."""
        p = self.progress
        due = p.validated < 0 or at_end or _crossed(self.intervals["validate"], p.validated, p.step)
        if not due or p.validated == p.step:
            return False
        started = time.monotonic()
        figures, self._examples = self.validator(self._at(p.step))
        self._since += time.monotonic() - started
        p.validated = p.step
        self.run.log(p.step, figures)
        self.run.show_examples(p.step, self._examples)
        self.run.show(p.step, fve=figures.get("val/fve_nrm", math.nan))
        return self._rank(figures)

    def _rank(self, figures: dict[str, float]) -> bool:
        """Return whether the model is among the best; if so, enter it in ``best`` under the name its checkpoint will get."""
        options, p = self.config.checkpoint, self.progress
        if options.best_metric not in figures:
            raise TrainingError(f"checkpoint.best_metric={options.best_metric} is not measured; there are: {', '.join(sorted(figures))}")
        value = figures[options.best_metric]
        if not math.isfinite(value):
            return False
        name = self.run.folder.name(p.step)
        sign = -1 if options.best_mode == "max" else 1
        best = sorted([*p.best, [value, name]], key=lambda entry: sign * entry[0])[: options.track_best_n]
        improved = [value, name] in best
        p.best = best if improved else p.best
        return improved

    def _save_if_due(self, now: bool) -> None:
        """Save after each interval, and when ``now`` says so; never the same state twice.

        The state is copied here; it is written while the training goes on.
        """
        p = self.progress
        keep = _crossed(self.intervals["keep"], p.kept[-1][0] if p.kept else 0, p.step)
        due = now or keep or _crossed(self.intervals["save"], max(p.saved, 0), p.step)
        if not due or (p.saved, self._saved_validation) == (p.step, p.validated):
            return
        self._saving.wait()
        names = stable_names(self.lens.lens_state_names())
        weights, optimizer = self.engine.weights_part(list(names)).named(names), self.engine.optimizer_part().named(names)
        parts = {"lens": weights, "engine/optimizer": optimizer}
        if names := stable_names(self.lens.reference_state_names()):
            parts["reference"] = self.engine.weights_part(list(names)).named(names)
        name = self.run.folder.name(p.step)
        if self.engine.is_main:
            (self.run.folder.begin(name) / "engine").mkdir()
            p.curve_lines = self.run.sync()
        found = self.engine.gather((name, first_not_finite(weights.tensors | optimizer.tensors)))
        name, spoilt = found[0][0], next((spoilt for _, spoilt in found if spoilt), None)
        if spoilt is not None:
            if self.engine.is_main:
                self.run.folder.drop(name)
            raise TrainingError(
                f"the weights are not finite at micro-step {p.step} ({spoilt}); they are not saved, the last checkpoint stays; "
                "lower learning_rate"
            )
        p.saved, self._saved_validation = p.step, p.validated
        if keep:
            p.kept.append([p.step, name])
        self._saving.start(partial(self._write, name, parts, dataclasses.asdict(p)))

    def _write(self, name: str, parts: dict[str, Part], progress: dict) -> None:
        """Write this rank's parts of a checkpoint, by their files' stems. Rank 0 gives the checkpoint its name when all are there."""
        run, folder = self.run.folder, self.run.folder.unfinished(name)
        if not self.engine.is_main:
            paths = [path for stem, part in parts.items() for path in part.write(folder, stem)]
            if paths:
                run.add_part(name, self.engine.rank, paths)
            return
        try:
            standard = (self.lens.mean, self.lens.var)
            save_lens(folder, self.config, parts["lens"], self.statistics, standard, self.lens.subject.fingerprint)
            for stem in parts.keys() - {"lens"}:
                parts[stem].write(folder, stem)
            state = {"format_version": TRAINER_VERSION, "progress": progress, "identity": self.identity}
            save_json(folder / "trainer.json", state | {"world_size": self.engine.world_size})
            best, kept = ([name for _, name in progress[key]] for key in ("best", "kept"))
            run.finish(name, best, kept, max(part.count for part in parts.values()))
        except OSError:
            run.drop(name)
            raise


def _crossed(interval: int, before: int, now: int) -> bool:
    """Whether a multiple of ``interval`` lies in ``(before, now]``."""
    return now // max(1, interval) > before // max(1, interval)
