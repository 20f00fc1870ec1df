#!/bin/bash
# Make a W&B sweep of a file and submit N agents for it, one trial each:
#
#   slurm/submit_sweep.sh sweeps/FILE.yaml N [options of sbatch, e.g. --gpus=1 --time=4:00:00]
#
# It prints the sweep's name and the agents' jobs. More agents later: sbatch slurm/sweep_agent.sbatch ENTITY/PROJECT/SWEEP_ID 1
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit
fi
fail() {
    echo "error: $1" >&2
    exit 1
}
file=${1:-} agents=${2:-}
[[ -f $file ]] || fail "there is no sweep file '$file'; usage: slurm/submit_sweep.sh FILE N"
[[ $agents =~ ^[1-9][0-9]*$ ]] || fail "N='$agents' must be a number of agents, 1 or more; usage: slurm/submit_sweep.sh FILE N"
for program in wandb sbatch; do
    command -v $program >/dev/null || fail "there is no $program command on the PATH"
done
said=$(wandb sweep "$file" 2>&1) || fail "wandb sweep $file failed: ${said##*$'\n'}"
sweep=$(sed -n 's|.*wandb agent \([^[:space:]]*/[^[:space:]]*/[^[:space:]]*\).*|\1|p' <<<"$said")
[[ $sweep ]] || fail "wandb sweep $file told no ENTITY/PROJECT/SWEEP_ID: ${said##*$'\n'}"
echo "sweep $sweep"
mkdir -p logs
agent=$(dirname "${BASH_SOURCE[0]}")/sweep_agent.sbatch
for ((i = 0; i < agents; i++)); do
    echo "job $(sbatch --parsable "${@:3}" "$agent" "$sweep" 1)"
done
