"""Run a W&B sweep file with no server: grid, random and Bayesian search, with hyperband's early ends.

    megalens sweep sweeps/tiny_lr.yaml
    megalens sweep sweeps/bayes_lr_batch_size.yaml --count 20 --jobs 2
    megalens sweep sweeps/tiny_lr.yaml --show

  --count N   trials in all, over every process and call (default: the file's run_cap, or the whole grid)
  --jobs M    trials at a time, each with its share of the GPUs and cores (default 1)
  --seed S    of the search (default 0)
  --show      only print how it stands

A trial is a training in outputs/<sweep>-<number>/, logged to W&B offline; `wandb sync` uploads it later. The sweep's own folder is
outputs/sweeps/<sweep>/: sweep.db, the trials' logs, report.html. The same command goes on where an earlier one stopped or was killed, and
several at once, on one machine or on many with a shared disk, share the work: it ends when all trials have. It prints the trials, the
best one's command and the page's place.

Exit codes: 0 all trials have ended; 1 an error, told in one line; 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megalens.arguments import Arguments, whole_number
from megalens.sweep import SweepError
from megalens.sweep.file import read_sweep


def main(arguments: list[str]) -> int:
    parser = Arguments("megalens sweep sweeps/tiny_lr.yaml --count 20")
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=whole_number(1))
    parser.add_argument("--jobs", type=whole_number(1), default=1)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--show", action="store_true")
    args = parser.read(arguments)
    sweep = read_sweep(args.file)
    try:
        from megalens.sweep import offline, report
        from megalens.sweep.search import Search
    except ModuleNotFoundError as error:
        if error.name not in ("optuna", "scipy"):
            raise
        raise SweepError(f"{error.name} is not installed; run make, or pip install -e '.[sweeps]'") from None
    folder = sweep.config(offline.first_point(sweep)).run_dir.parent / "sweeps" / sweep.name
    if not args.show:
        offline.check_sweep(sweep)
    search = Search(sweep, folder, args.count, args.seed)
    page = folder / "report.html"
    code = 0
    if not args.show:
        code = offline.Workers(search, args.jobs, say, lambda: report.write(search, page)).run()
    report.write(search, page)
    print(report.table(search))
    if command := report.best_command(search):
        print(f"\nbest: {command}\nmeasure it: python tools/eval.py checkpoint={best_folder(search)}/best")
    print(f"page: {page}")
    if code:
        say("stopped; the same command goes on from here")
    elif not args.show and search.best() is None:
        raise SweepError(f"no trial was trained to its end; {folder} holds their logs")
    return code


def best_folder(search) -> Path:
    """The run of the best trial."""
    from megalens.sweep.offline import trial_config
    from megalens.sweep.search import point_of

    best = search.best()
    return trial_config(search.sweep, best.number, point_of(best)).run_dir


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"[sweep] {line}", file=sys.stderr, flush=True)
