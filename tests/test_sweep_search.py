"""Handing out trials: each once, whoever asks and whoever dies, and the searches find what they should. No training runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState
from sweep_search import best_of, spent, sweep

from megalens.sweep import SweepError
from megalens.sweep.file import COMMAND, Halving, SweepFile
from megalens.sweep.search import Search, point_of

GRID = SweepFile("grid", "", "grid", COMMAND, "val/loss", False, None, None, {}, {"t_text": [2, 3], "lora.r": [4, 8, None]}, {})
WORK = """
import sys, time
from pathlib import Path
from optuna.trial import TrialState
from megalens.sweep.search import Search
from test_sweep_search import GRID
search = Search(GRID, Path(sys.argv[1]))
while not search.is_over():
    if claim := search.claim():
        print(claim.number, flush=True)
        time.sleep(float(sys.argv[2]))
        claim.end(TrialState.COMPLETE, claim.number)
"""


def worker(folder, seconds):
    path = ":".join(sys.path)
    command = [sys.executable, "-c", WORK, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def test_a_grid_is_every_combination_once_and_then_nothing(tmp_path):
    search = Search(GRID, tmp_path)
    points = []
    while claim := search.claim():
        points.append(claim.point)
        claim.end(TrialState.COMPLETE, 1.0)
    assert points == list(GRID.grid())
    assert search.is_over()


def test_two_processes_share_a_study_one_is_killed_and_no_trial_is_run_twice_or_lost(tmp_path):
    doomed = worker(tmp_path, 60)
    taken = int(doomed.stdout.readline())
    other = worker(tmp_path, 0.1)
    first = int(other.stdout.readline())
    doomed.kill()
    doomed.wait()
    done = [first, *map(int, other.communicate(timeout=60)[0].split())]
    assert sorted(done) == [0, 1, 2, 3, 4, 5]
    assert taken in done, "the killed worker's trial is taken over under its own number"
    trials = Search(GRID, tmp_path).trials()
    assert [point_of(trial) for trial in trials] == list(GRID.grid())
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}


def test_a_trial_that_is_worked_at_is_not_handed_out_again(tmp_path):
    search = Search(GRID, tmp_path, count=1)
    claim = search.claim()
    assert search.claim() is None
    assert not search.is_over()
    claim.leave()
    again = search.claim()
    assert (again.number, again.point, again.wandb_run) == (claim.number, claim.point, claim.wandb_run)


def test_bayesian_search_beats_random_search():
    seeds = range(3)
    random, bayes = ([best_of(method, seed, trials=12) for seed in seeds] for method in ("random", "bayes"))
    assert sum(bayes) < sum(random) / 2


def test_bayesian_search_tries_no_point_twice_where_the_best_is_at_an_end_of_its_range(tmp_path):
    search, tried = Search(sweep("bayes"), tmp_path, count=10), []
    while claim := search.claim():
        tried.append((claim.point["batch_size"], f"{claim.point['learning_rate']:.3g}"))
        claim.end(TrialState.COMPLETE, -claim.point["learning_rate"])
    assert "0.001" in [rate for _, rate in tried]
    assert len(set(tried)) == 10


def test_halving_spends_at_most_half_and_still_ends_near_the_best():
    share, best = spent(seed=0, trials=16, halving=Halving(3, 2))
    assert share <= 0.5
    assert best < 0.2


def test_a_sweep_without_an_end_asks_for_one(tmp_path):
    with pytest.raises(SweepError, match=r"a random sweep goes on for ever; say how many trials: --count N"):
        Search(sweep("random"), tmp_path)


def test_a_folder_of_another_sweep_is_refused_by_what_differs(tmp_path):
    Search(sweep("random"), tmp_path, count=3)
    Search(sweep("random"), tmp_path, count=5)
    with pytest.raises(SweepError, match=r"was begun with another halving; copy the sweep file to a new name, or remove"):
        Search(sweep("random", Halving(1, 2)), tmp_path, count=3)


def test_importance_names_the_key_that_matters(tmp_path):
    search = Search(GRID, tmp_path)
    while claim := search.claim():
        claim.end(TrialState.COMPLETE, claim.point["t_text"] + 0.01 * claim.number)
    importance = search.importance()
    assert next(iter(importance)) == "t_text"
    assert Path(tmp_path / "sweep.db").is_file()
