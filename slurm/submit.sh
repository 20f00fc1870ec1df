#!/bin/bash
# The whole pipeline as jobs that wait for each other: pretokenize, dump, train (a warm start named by init_from first).
#
#   slurm/submit.sh config=conf/demo.yaml key=value ...
#   slurm/submit.sh --nodes=2 --gpus-per-node=8 --time=24:00:00 -- config=conf/demo.yaml key=value ...
#
# What stands before -- is for sbatch, for every job; the tokenizing takes one node of it. Text and dumps that are there and valid are
# reused, and it says what is not and why. LAUNCHER and the rest of slurm/multinode.sbatch's environment hold here too; without it
# --deepspeed FILE chooses the deepspeed launcher. On a machine without Slurm the stages run here, one after another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' slurm/submit.sh
    exit
fi
if command -v sbatch >/dev/null; then
    mkdir -p logs
    exec python tools/submit_jobs.py "$@"
fi
echo "[submit] no Slurm here (sbatch is not on the PATH): the stages run on this machine" >&2
if [[ " $* " == *" -- "* ]]; then
    while [[ $1 != -- ]]; do shift; done
    shift
fi
exec python tools/run_pipeline.py "$@"
