"""Submit the stages of `megalens pipeline` as Slurm jobs, each starting when the one before has succeeded.

    megalens submit [OPTIONS OF SBATCH --] config=conf/demo.yaml key=value ...

Text and dumps that are there and valid get no job; it says what is not and why. slurm/submit.sh calls it; the jobs run
slurm/multinode.sbatch, so it is started in a checkout of megalens.
"""

from __future__ import annotations

from megalens.pipeline.jobs import submit_stages
from megalens.pipeline.stages import phases_of


def main(arguments: list[str]) -> None:
    at = arguments.index("--") if "--" in arguments else -1
    submit_stages(phases_of(arguments[at + 1 :]), arguments[: max(at, 0)])
