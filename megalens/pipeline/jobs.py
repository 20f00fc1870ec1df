"""The stages as Slurm jobs, each starting when the one before has succeeded."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from megalens.config import ConfigError
from megalens.pipeline.stages import Phase, data_stages, why_kept

SCRIPTS = {"pretokenize": "tools/pretokenize.py", "dump": "tools/dump_acts.py"}
BATCH = Path("slurm/multinode.sbatch")


def submit_stages(phases: list[Phase], options: list[str]) -> None:
    """Submit what each phase needs and does not have, and its training.

    Args:
        phases: in the order in which they are trained; the last one asks for new data with ``force_redump``.
        options: of sbatch, for every job.

    Raises:
        ConfigError: this is no checkout of megalens, or sbatch refuses a job.
    """
    if not BATCH.is_file():
        raise ConfigError(f"there is no {BATCH} here; submit jobs from a checkout of megalens")
    chain = JobChain(options)
    force = phases[-1].config.force_redump
    planned: set[Path] = set()
    for phase in phases:
        for command, target, problem in data_stages(phase.config):
            if target in planned:
                continue
            why_not = problem()
            if not force and why_not is None:
                say(f"{target}: {why_kept(target)}")
                continue
            planned.add(target)
            say(f"{target}: {'made anew, as force_redump=true asks' if force else why_not}")
            # One process tokenizes, and DeepSpeed has no part in either.
            alone = command == "pretokenize"
            environment = {"LAUNCHER": "torchrun"} | ({"PROCESSES_PER_NODE": "1"} if alone else {})
            script = [SCRIPTS[command], *phase.arguments, *(["force_redump=true"] if force else [])]
            chain.submit(script, ["--nodes=1"] if alone else [], environment)
        launcher = os.environ.get("LAUNCHER", "torchrun" if phase.config.deepspeed is None else "deepspeed")
        say(f"{phase.config.run_dir}: training")
        chain.submit(["megalens/train.py", *phase.arguments], [], {"LAUNCHER": launcher})
    say(f"squeue shows the jobs, logs/ what they say; the lens will be in {phases[-1].config.run_dir / 'best'}")


class JobChain:
    """Jobs of slurm/multinode.sbatch, each waiting for the success of the one submitted before.

    Args:
        options: of sbatch, for every job.
    """

    def __init__(self, options: list[str]):
        self.options = options
        self.after: list[str] = []

    def submit(self, script: list[str], options: list[str], environment: dict[str, str]) -> None:
        """Submit a job.

        Args:
            script: the program and its arguments.
            options: of sbatch, for this job; they outdo those of all jobs.
            environment: added to this process's.

        Raises:
            ConfigError: sbatch refuses it.
        """
        name = f"--job-name=megalens-{Path(script[0]).stem}"
        command = ["sbatch", "--parsable", name, *self.after, *self.options, *options, str(BATCH), *script]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"sbatch refused {shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        job = done.stdout.strip().partition(";")[0]
        say(f"job {job}: {shlex.join(command)}")
        self.after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def say(line: str) -> None:
    """Tell the person at the keyboard, on stderr."""
    print(f"[submit] {line}", file=sys.stderr, flush=True)
