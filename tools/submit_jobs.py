"""The stages of tools/run_pipeline.py as Slurm jobs, each starting when the one before has succeeded; slurm/submit.sh calls it.

    python tools/submit_jobs.py [OPTIONS OF SBATCH --] config=conf/demo.yaml key=value ...

Text and dumps that are there and valid get no job; it says what is not and why.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from run_pipeline import data_stages, plan

from megalens import cli
from megalens.config import ConfigError


def main(arguments: list[str]) -> None:
    at = arguments.index("--") if "--" in arguments else -1
    chain = JobChain(arguments[: max(at, 0)])
    phases = plan(arguments[at + 1 :])
    force = phases[-1].config.force_redump
    planned: set[Path] = set()
    for phase in phases:
        for tool, target, problem in data_stages(phase.config):
            if target in planned:
                continue
            why_not = problem()
            if force or why_not is not None:
                planned.add(target)
                say(f"{target}: {'made anew, as force_redump=true asks' if force else why_not}")
                # One process tokenizes, and DeepSpeed has no part in either.
                alone = tool == "pretokenize.py"
                environment = {"LAUNCHER": "torchrun"} | ({"PROCESSES_PER_NODE": "1"} if alone else {})
                options = ["--nodes=1"] if alone else []
                chain.submit([f"tools/{tool}", *phase.arguments, *(["force_redump=true"] if force else [])], options, environment)
            else:
                say(f"{target}: valid, reusing it")
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
        command = ["sbatch", "--parsable", name, *self.after, *self.options, *options, "slurm/multinode.sbatch", *script]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"sbatch refused {shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        job = done.stdout.strip().partition(";")[0]
        say(f"job {job}: {shlex.join(command)}")
        self.after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]


def say(line: str) -> None:
    print(f"[submit] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, __doc__)
