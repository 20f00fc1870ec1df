"""Which trial comes next: Optuna's samplers and pruner over a study in SQLite that several processes share.

Trials are handed out under a lock. A worker holds a second lock while it runs its trial. A worker that dies loses that lock, and the next
one that asks takes the trial over under its own number. So no trial is run twice and none is lost.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from megalens.files import Lock
from megalens.sweep import SweepError
from megalens.sweep.file import Range, SweepFile

optuna.logging.set_verbosity(optuna.logging.ERROR)
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_STARTUP = 5  # random trials before the Bayesian search has something to go by


class Claim:
    """A trial that this process works at, until :meth:`end` or :meth:`leave`.

    Attributes:
        number: of the trial, from 0.
        point: its values of the searched keys.
        wandb_run: the id of its W&B run.
        lock: held while somebody works at it.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial, lock: Lock):
        self._study, self._trial, self.lock = study, trial, lock
        self.number: int = trial.number
        self.point: dict = json.loads(trial.user_attrs["point"])
        self.wandb_run: str = trial.user_attrs["wandb_run"]

    def note(self, name: str, value: Any) -> None:
        """Keep something beside the trial."""
        self._trial.set_user_attr(name, value)

    def is_hopeless(self, looks: int, value: float) -> bool:
        """Report the metric at a look (its count of values); True when early_terminate ends the trial here."""
        self._trial.report(value, looks)
        return self._trial.should_prune()

    def end(self, state: TrialState, value: float | None = None) -> None:
        """The trial is over: COMPLETE or PRUNED with its value, or FAIL without."""
        self._trial.set_user_attr("value", value)
        self._study.tell(self._trial, value if state == TrialState.COMPLETE else None, state=state, skip_if_finished=True)
        self.leave()

    def leave(self) -> None:
        """Leave the trial to the next worker that asks."""
        self.lock.release()


class Search:
    """A sweep's trials.

    Args:
        sweep: the file.
        folder: where its state is kept, in ``sweep.db``; made when missing.
        count: how many trials there are to be at most; None: the file's run_cap, or the whole grid.
        seed: of the search.

    Raises:
        SweepError: the folder holds another sweep, or nothing says where this one ends.
    """

    def __init__(self, sweep: SweepFile, folder: Path, count: int | None = None, seed: int = 0):
        self.sweep, self.folder, self._seed = sweep, folder, seed
        limits = [n for n in (count, sweep.run_cap, self._grid_size()) if n is not None]
        if not limits:
            raise SweepError(f"a {sweep.method} sweep goes on for ever; say how many trials: --count N, or run_cap: N in the file")
        self.limit = min(limits)
        folder.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'sweep.db'}", engine_kwargs={"connect_args": {"timeout": 60}})
        with self._turn():
            self.study = optuna.create_study(
                study_name=sweep.name,
                storage=storage,
                sampler=self._sampler(0),
                pruner=self._pruner(),
                direction="maximize" if sweep.maximize else "minimize",
                load_if_exists=True,
            )
            self._check_same()

    def claim(self) -> Claim | None:
        """The next trial to work at: one that was left unfinished, else a new one; None: there is none to be had now."""
        with self._turn():
            trials = self.trials()
            for trial in trials:
                lock = Lock(self.folder / f"trial-{trial.number}.lock")
                if trial.state == TrialState.RUNNING and lock.acquire(wait=False):
                    if "point" in trial.user_attrs:
                        return Claim(self.study, optuna.trial.Trial(self.study, trial._trial_id), lock)
                    self.study.tell(trial.number, state=TrialState.FAIL)  # killed between asking and writing down
                    lock.release()
            started = [t for t in trials if "point" in t.user_attrs]
            if len(started) >= self.limit:
                return None
            lock = Lock(self.folder / f"trial-{len(self.study.get_trials(deepcopy=False))}.lock")
            lock.acquire(wait=True)
            return Claim(self.study, self._ask(len(started)), lock)

    def trials(self) -> list[FrozenTrial]:
        """All trials so far, as the database has them."""
        return self.study.get_trials(deepcopy=False)

    def unique_name(self) -> str:
        """The sweep's name, unlike that of another begun in its place."""
        first = next(t for t in self.trials() if "point" in t.user_attrs)
        return f"{self.sweep.name}-{first.user_attrs['wandb_run']}"

    def is_over(self) -> bool:
        """Have all trials ended?"""
        trials = [t for t in self.trials() if "point" in t.user_attrs]
        return len(trials) >= self.limit and all(t.state in ENDED for t in trials)

    def best(self) -> FrozenTrial | None:
        """The best trial that was trained to its end."""
        ended = [t for t in self.trials() if t.state == TrialState.COMPLETE and t.value is not None]
        return (max if self.sweep.maximize else min)(ended, key=attrgetter("value"), default=None)

    def importance(self) -> dict[str, float]:
        """How much of the metric's spread each searched key explains, in [0, 1], the largest first; empty with too few trials."""
        ended = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        varied = [key for key in self.sweep.searched if len({json.dumps(point_of(t)[key]) for t in ended}) > 1]
        if len(ended) < 4 or len({t.value for t in ended}) < 2 or not varied:
            return {}
        halves = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)  # what sets the better half apart
        return optuna.importance.get_param_importances(self.study, evaluator=halves, params=varied)

    # ------------------------------------------------------------------------------------------------------------------

    def _ask(self, index: int) -> optuna.Trial:
        self.study.sampler = self._sampler(index)
        if self.sweep.method == "grid":
            point = next(islice(self.sweep.grid(), index, None))
            self.study.enqueue_trial({key: str(value) for key, value in point.items()})
        trial = self.study.ask(self._distributions())
        options = {key: dict(zip(map(str, values), values, strict=True)) for key, values in self.sweep.choices.items()}
        point = {key: options[key][value] if key in options else value for key, value in trial.params.items()}
        trial.set_user_attr("wandb_run", secrets.token_hex(4))
        trial.set_user_attr("point", json.dumps({key: point[key] for key in self.sweep.searched}))
        return trial

    def _distributions(self) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {key: CategoricalDistribution([str(v) for v in vs]) for key, vs in self.sweep.choices.items()}
        return found | {key: _numbers(numbers) for key, numbers in self.sweep.ranges.items()}

    def _sampler(self, index: int) -> optuna.samplers.BaseSampler:
        """Seeded by the trial's number, so that processes that share a study do not draw the same points."""
        seed = self._seed * 1_000_003 + index
        if self.sweep.method != "bayes":
            return optuna.samplers.RandomSampler(seed=seed)
        if self.sweep.halving is not None:  # learns from ended trials too
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP, multivariate=True, constant_liar=True)
        return _NewPoints(seed=seed, n_startup_trials=_STARTUP)

    def _pruner(self) -> optuna.pruners.BasePruner:
        halving = self.sweep.halving
        if halving is None:
            return optuna.pruners.NopPruner()
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=halving.min_iter, reduction_factor=halving.eta)

    def _grid_size(self) -> int | None:
        return math.prod(len(values) for values in self.sweep.choices.values()) if self.sweep.method == "grid" else None

    def _check_same(self) -> None:
        settings = dataclasses.asdict(self.sweep)
        mine = json.dumps({key: settings[key] for key in settings if key != "run_cap"}, sort_keys=True)
        if self.study.user_attrs.setdefault("file", mine) == mine:
            self.study.set_user_attr("file", mine)
            return
        then, now = json.loads(self.study.user_attrs["file"]), json.loads(mine)
        changed = ", ".join(key for key in now if now[key] != then.get(key))
        raise SweepError(f"{self.folder} was begun with another {changed}; copy the sweep file to a new name, or remove that folder")

    def _turn(self) -> Lock:
        return Lock(self.folder / "claim.lock")


class _NewPoints(optuna.samplers.GPSampler):
    """A Gaussian process that tries no point twice: a training repeated is the same to the last digit.

    Where the best is at an end of a range, it would ask for that end over and over; a random point is drawn instead.
    """

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict:
        point = super().sample_relative(study, trial, search_space)
        return {} if any(_equal(point, other.params) for other in study.get_trials(deepcopy=False)) else point


def point_of(trial: FrozenTrial) -> dict:
    """A trial's values of the searched keys."""
    return json.loads(trial.user_attrs["point"])


def _equal(point: dict, other: dict) -> bool:
    """Are two points the same, to one part in a thousand?"""
    return point.keys() == other.keys() and all(
        math.isclose(value, other[key], rel_tol=1e-3) if isinstance(value, float) else value == other[key] for key, value in point.items()
    )


def _numbers(numbers: Range) -> BaseDistribution:
    if numbers.whole:
        return IntDistribution(int(numbers.low), int(numbers.high), step=int(numbers.step or 1))
    return FloatDistribution(numbers.low, numbers.high, log=numbers.log, step=numbers.step)
