#!/usr/bin/env bash
# Run one cell of a study; `maestro-scale study FILE --slurm` submits this script as an array, one task per cell, and
# once more with --report for the tables. To submit it by hand:
#
#   sbatch --array=0-34%8 --gpus-per-task=1 slurm/study.sh FILE --scale gpu --root ROOT
#
# The number of a task is that of a cell in FILE as it is when the task starts, so do not edit FILE before; with --slurm
# it is that of a line in the file of names after --cells.
# A cell uses one task with at most one GPU. A requeued task resumes. Settings: slurm/env.sh, docs/clusters.md.
#SBATCH --job-name=maestro-study
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%A_%a.log
set -uo pipefail

MAESTRO_HOME=${MAESTRO_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
[ -f "$MAESTRO_HOME/slurm/env.sh" ] || MAESTRO_HOME=${SLURM_SUBMIT_DIR:-}
[ -f "$MAESTRO_HOME/slurm/env.sh" ] || { echo "error: set MAESTRO_HOME to the checkout of maestro_scale" >&2; exit 2; }
export MAESTRO_HOME
# shellcheck source=slurm/env.sh
. "$MAESTRO_HOME/slurm/env.sh"

[ "${MAESTRO_CHECK:-0}" = 0 ] || die 2 "MAESTRO_CHECK: use maestro-scale study FILE --dry-run"

need_slurm slurm/study.sh
see "$@" # FILE, ROOT, and others that are given as two words; MAESTRO_DATA is mounted anyway
prepare
CELL=()
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || CELL=(--cell "$SLURM_ARRAY_TASK_ID")
CPUS=${SLURM_CPUS_ON_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
BIND=() # see pretrain_multinode.sh
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || BIND=(--cpu-bind="${MAESTRO_CPU_BIND:-none}")

# In the background, so that the signal before the time limit, which SLURM sends to this shell, is passed on at once.
srun --nodes=1 --ntasks=1 --cpus-per-task="$CPUS" --kill-on-bad-exit=1 --quiet ${BIND[@]+"${BIND[@]}"} ${STEP[@]+"${STEP[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} \
  "$PYTHON" -m maestro_scale.cli study "$@" ${CELL[@]+"${CELL[@]}"} &
TASK=$!
trap 'kill -TERM "$TASK" 2>/dev/null' TERM
STATUS=
while [ -z "$STATUS" ]; do
  wait "$TASK"
  STATUS=$?
  kill -0 "$TASK" 2>/dev/null && STATUS= # the trap interrupted the wait
done
[ "$CACHE_IS_OURS" = 0 ] || rm -rf "$MAESTRO_CACHE"
exit "$STATUS"
