#!/usr/bin/env bash
# Map an area with a model, on all GPUs of a job:
#
#   sbatch --nodes=2 --gpus-per-node=8 slurm/predict.sh MODEL SRC OUT [options of `maestro-scale predict`]
#   sbatch --nodes=4 --ntasks-per-node=8 slurm/predict.sh MODEL SRC OUT --device cpu
#
# The ranks share the windows. A requeued job, or the same command submitted again, continues where it stopped, and the
# maps are the same bytes as those of one task. MODEL, SRC and OUT must be visible to all nodes.
# MAESTRO_CHECK=1 sbatch … (or bash instead of sbatch) prints what would run, and exits.
# Settings: slurm/env.sh, docs/clusters.md.
#SBATCH --job-name=maestro-predict
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

MAESTRO_HOME=${MAESTRO_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
[ -f "$MAESTRO_HOME/slurm/env.sh" ] || MAESTRO_HOME=${SLURM_SUBMIT_DIR:-}
[ -f "$MAESTRO_HOME/slurm/env.sh" ] || { echo "error: set MAESTRO_HOME to the checkout of maestro_scale" >&2; exit 2; }
export MAESTRO_HOME
# shellcheck source=slurm/env.sh
. "$MAESTRO_HOME/slurm/env.sh"

[ $# -ge 3 ] || die 2 "usage: sbatch slurm/predict.sh MODEL SRC OUT [options of \`maestro-scale predict\`]"
pretend_job 1
need_slurm slurm/predict.sh
OUT=$3
[ "${MAESTRO_CHECK:-0}" = 1 ] || mkdir -p "$OUT" || die 2 "cannot write to $OUT from $(uname -n): OUT must be on a disk that all nodes share"
see "$@" # MODEL, SRC and OUT, and values of options that are folders, such as --files
prepare
list_nodes
PER_NODE=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
PER_NODE=${PER_NODE%%(*}
CPUS=$((${SLURM_CPUS_ON_NODE:-1} / PER_NODE)) # srun gives a task one CPU unless told otherwise
[ "$CPUS" -ge 1 ] || die 2 "$PER_NODE tasks per node on ${SLURM_CPUS_ON_NODE:-1} CPUs: ask for fewer, or for more CPUs"
if [ "${MAESTRO_CHECK:-0}" = 1 ]; then
  check_line nodes "${#NODES[@]}: ${NODES[*]}, $PER_NODE tasks each, $CPUS CPUs and ${SLURM_GPUS_ON_NODE:-0} GPUs of a node"
  check_line mounts "${MOUNTS:-none: no MAESTRO_IMAGE}"
  check_line command "$(printf '%q ' maestro-scale predict "$@")"
  [ "$CACHE_IS_OURS" = 0 ] || rm -rf "$MAESTRO_CACHE"
  say "nothing was started (MAESTRO_CHECK=1)"
  exit 0
fi
rendezvous_port
export MASTER_ADDR=${NODES[0]} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ ${#NODES[@]} -gt 1 ] || export MASTER_ADDR=127.0.0.1
BIND=() # see pretrain_multinode.sh
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || BIND=(--cpu-bind="${MAESTRO_CPU_BIND:-none}")
say "predict $2 with $1 on ${#NODES[@]} nodes, $PER_NODE tasks each -> $OUT"
srun --nodes="${#NODES[@]}" --ntasks="$((${#NODES[@]} * PER_NODE))" --ntasks-per-node="$PER_NODE" --cpus-per-task="$CPUS" \
  --kill-on-bad-exit=1 --quiet ${BIND[@]+"${BIND[@]}"} ${STEP[@]+"${STEP[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} \
  "$PYTHON" -m maestro_scale.cluster.launch -m maestro_scale.cli predict "$@"
STATUS=$?
[ "$CACHE_IS_OURS" = 0 ] || rm -rf "$MAESTRO_CACHE"
[ "$STATUS" = 0 ] || die 1 "the prediction failed: see the lines above; submit the same command again to continue"
say "maps in $OUT"
