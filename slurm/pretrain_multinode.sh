#!/usr/bin/env bash
# Pretrain on any number of nodes:  sbatch [-N NODES --gpus-per-node=8] slurm/pretrain_multinode.sh RECIPE [--run-dir DIR] [--set K=V …]
#
# One task per GPU, with --gpus-per-node=N or --gpus-per-task=1 --ntasks-per-node=N (without GPUs: --ntasks-per-node). All nodes are checked first; bad ones are reported and excluded.
# At the time limit or before preemption the run saves a checkpoint, and the job requeues itself and resumes. It ends
# when the recipe is done, or after three failures without a new checkpoint. Settings: slurm/env.sh, docs/clusters.md.
# MAESTRO_CHECK=1 sbatch … (or bash instead of sbatch, without SLURM) prints what would run, and exits.
# MAESTRO_HEALTH=0 skips the health check, MAESTRO_MAX_FAILURES (3), MAESTRO_HEALTH_TIMEOUT_S (180), MAESTRO_MIN_FREE_GIB (1).
#SBATCH --job-name=maestro
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

MAESTRO_HOME=${MAESTRO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
if [ ! -f "$MAESTRO_HOME/slurm/env.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then # submitted from another folder
  MAESTRO_HOME=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/pretrain_multinode\.sh.*|\1|p')
fi
[ -f "$MAESTRO_HOME/slurm/env.sh" ] || { echo "error: set MAESTRO_HOME to the checkout of maestro_scale" >&2; exit 2; }
export MAESTRO_HOME
# shellcheck source=slurm/env.sh
. "$MAESTRO_HOME/slurm/env.sh"

CHECK=${MAESTRO_CHECK:-0}
pretend_job 2 # as above
need_slurm slurm/pretrain_multinode.sh
[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || die 2 "no recipe: sbatch slurm/pretrain_multinode.sh recipes/vitb.yaml [--set section.key=value]"
RECIPE=$1
shift
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then # --fresh holds for the first start only, a requeued job resumes
  ARGS=()
  for word in "$@"; do [ "$word" = --fresh ] || ARGS+=("$word"); done
  set -- ${ARGS[@]+"${ARGS[@]}"}
fi

# SIGUSR1 announces the end of the job. From here on it is forwarded to the tasks until they have saved and exited.
ASKED=0
trap 'ASKED=1; AGAIN=1' USR1

# supervise COMMAND…: run it, forwarding SIGUSR1; returns its exit status. A trapped signal interrupts `wait`, which is
# then called again.
supervise() {
  "$@" &
  local pid=$! status=0 reminder=""
  AGAIN=1
  while [ "$AGAIN" = 1 ]; do
    AGAIN=0 status=0
    wait "$pid" || status=$?
    # Tasks that are still starting ignore the signal (see cluster/launch.py), so it is repeated.
    if [ "$ASKED" = 1 ] && [ -z "$reminder" ] && kill -0 "$pid" 2>/dev/null; then
      say "stop requested: saving a checkpoint"
      (trap - USR1; while kill -USR1 "$pid" 2>/dev/null; do sleep 3; done) &
      reminder=$!
      AGAIN=1
    fi
  done
  [ -z "$reminder" ] || kill "$reminder" 2>/dev/null
  return "$status"
}

# Called only after the run is saved: `scontrol requeue` also ends this script. Ignoring TERM lets it run a few more
# seconds, for the update of the excluded nodes.
requeue() {
  local excluded="${1:-}" before
  clean
  trap '' TERM
  say "requeueing job $SLURM_JOB_ID"
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    die 1 "this cluster does not let the job requeue itself: submit the same command again, it continues from the last checkpoint"
  fi
  if [ -n "$excluded" ]; then
    before=$(squeue --noheader --job="$SLURM_JOB_ID" --Format=exc_nodes:4096 2>/dev/null | tr -d ' ')
    [ "$before" = "(null)" ] && before=""
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$excluded" ||
      say "could not exclude $excluded: scancel $SLURM_JOB_ID, and submit again with --exclude=$excluded"
  fi
  exit 0
}

# Remove the cache that prepare() created, on all nodes.
clean() {
  [ "$CACHE_IS_OURS" = 1 ] || return 0
  timeout 60 srun --overlap --quiet --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    rm -rf "$MAESTRO_CACHE" 2>/dev/null
}

see "$RECIPE" # it may extend others in its folder
prepare
list_nodes
if [ "$CHECK_OUTSIDE" = 0 ]; then
  warn_short 180 # --signal, as above
  # GPUs of the first node, whether or not the job has them: gpu:8(S:0-1)
  MAESTRO_NODE_GRES=$(scontrol show node "${NODES[0]}" 2>/dev/null | sed -n 's/^ *Gres=\(gpu[^ ]*\).*/\1/p')
  export MAESTRO_NODE_GRES
fi
NUM_NODES=${#NODES[@]}
PER_NODE=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
PER_NODE=${PER_NODE%%(*}
CPUS=$((${SLURM_CPUS_ON_NODE:-1} / PER_NODE))
[ "$CPUS" -ge 1 ] || die 2 "$PER_NODE tasks per node on ${SLURM_CPUS_ON_NODE:-1} CPUs: ask for fewer, or for more CPUs"
export MAESTRO_NODES="${NODES[*]}" MASTER_ADDR=${NODES[0]}
rendezvous_port
export MAESTRO_GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-0} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # its errors name a cause
# With GPUs each rank restricts itself to the CPUs next to its GPU, which only works if it may use all of the job's.
BIND=()
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || BIND=(--cpu-bind="${MAESTRO_CPU_BIND:-none}")
[ "$NUM_NODES" -gt 1 ] || export MASTER_ADDR=127.0.0.1

# Check the recipe and its data before any task starts: an error in it is reported at once, and not by every rank.
RANKS=$((NUM_NODES * PER_NODE))
if [ -n "${MAESTRO_IMAGE:-}" ]; then # once more, with the folders that the recipe names
  see_recipe "$RANKS" "$RECIPE" "$@" || die 2 "the recipe cannot be used; see the lines above"
  [ "$CHECK" = 1 ] || mkdir -p "$RUNS" 2>/dev/null
  enter_image
fi
if [ "$CHECK" = 1 ]; then
  check_line nodes "$NUM_NODES: ${NODES[*]}$([ "$CHECK_OUTSIDE" = 0 ] || echo " (the default; sbatch -N says how many)")"
  check_line ranks "$RANKS: $PER_NODE per node, $CPUS CPUs and ${SLURM_GPUS_ON_NODE:-0} GPUs of a node; rank 0 at $MASTER_ADDR:$MASTER_PORT"
  check_line python "$(command -v "$PYTHON")${MAESTRO_IMAGE:+ in $MAESTRO_IMAGE}"
  check_line mounts "${MOUNTS:-none: no MAESTRO_IMAGE}"
  check_line cache "$MAESTRO_CACHE$([ "$CACHE_IS_OURS" = 0 ] || echo ", removed at the end")"
  run_python -m maestro_scale.cluster.preflight show "$RANKS" --recipe "$RECIPE" "$@"
  STATUS=$?
  LOGS='RUN_DIR/logs/JOB.START'
else
  RUN_DIR=$(run_python -m maestro_scale.cluster.preflight run-dir "$RANKS" --recipe "$RECIPE" "$@")
  case $? in
    0) ;;
    4) clean; die 2 "the data of the recipe is missing or cannot be read, see the line above; no node is at fault. Check the paths, MAESTRO_DATA=${MAESTRO_DATA:-} and credentials, and submit again" ;;
    5) clean; die 2 "the job has no GPUs, see the line above" ;;
    *) clean; die 2 "the recipe cannot be used; see the lines above" ;;
  esac
  LOGS="$RUN_DIR/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
  mkdir -p "$LOGS" || die 2 "cannot write to $RUN_DIR from $(uname -n): --run-dir must be on a disk that all nodes share, with free space"
  say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $NUM_NODES nodes (${NODES[*]}), $PER_NODE tasks each; run in $RUN_DIR, logs of ranks in $LOGS"
fi

# launch TASKS_PER_NODE CPUS LOG_NAME python arguments…: run srun. `exec`, so that the process that `supervise` signals is
# srun itself.
launch() {
  local tasks=$1 cpus=$2 name=$3 gpus=()
  shift 3
  if [ "$tasks" = 1 ] && [ "$PER_NODE" -gt 1 ] && [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then # one task for all GPUs of a node
    # srun inherits the job's --gpus-per-task and --gpu-bind, with which this task would see a single GPU.
    unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPU_BIND SLURM_TRES_BIND
    gpus=(--gpus-per-node="$SLURM_GPUS_ON_NODE")
  fi
  local command=(srun --nodes="$NUM_NODES" --ntasks="$((NUM_NODES * tasks))" --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 --wait=60 --overlap --quiet --open-mode=append --output="$LOGS/$name-%4t.log" \
    ${gpus[@]+"${gpus[@]}"} ${BIND[@]+"${BIND[@]}"} ${STEP[@]+"${STEP[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} "$PYTHON" -m maestro_scale.cluster.launch "$@")
  [ "$CHECK" = 0 ] || { check_line "$name" "$(printf '%q ' "${command[@]}")"; return 0; }
  exec "${command[@]}"
}

if [ "$CHECK" = 1 ]; then
  [ "${MAESTRO_HEALTH:-1}" = 0 ] ||
    (launch 1 "${SLURM_CPUS_ON_NODE:-1}" health -m maestro_scale.cluster.health --recipe "$RECIPE" --reports "$LOGS" "$@")
  (launch "$PER_NODE" "$CPUS" rank "$MAESTRO_HOME/maestro_scale/train.py" --recipe "$RECIPE" "$@")
  if [ "$CACHE_IS_OURS" = 1 ]; then rm -rf "$MAESTRO_CACHE"; fi
  [ "$STATUS" = 0 ] || die 2 "this would end at once; see the lines above"
  say "nothing was started (MAESTRO_CHECK=1)"
  exit 0
fi

if [ "${MAESTRO_HEALTH:-1}" = 1 ]; then
  say "checking the nodes"
  check() {
    launch 1 "${SLURM_CPUS_ON_NODE:-1}" health -m maestro_scale.cluster.health \
      --recipe "$RECIPE" --reports "$LOGS" --timeout_s "${MAESTRO_HEALTH_TIMEOUT_S:-180}" "$@"
  }
  supervise check "$@" || true # the reports say more than the exit status of srun
  [ "$ASKED" = 0 ] || requeue
  BAD=$(run_python -m maestro_scale.cluster.verdict "$LOGS" "${NODES[@]}")
  case $? in
    0) ;;
    3) requeue "$BAD" ;;
    *) clean; exit 2 ;;
  esac
fi

say "training"
rm -f "$RUN_DIR/outcome.json"
supervise launch "$PER_NODE" "$CPUS" rank "$MAESTRO_HOME/maestro_scale/train.py" --recipe "$RECIPE" "$@"
STATUS=$?
run_python -m maestro_scale.cluster.attempts decide --run_dir "$RUN_DIR" --logs "$LOGS" --status "$STATUS" --asked "$ASKED" \
  --max_failures "${MAESTRO_MAX_FAILURES:-3}"
case $? in
  0) clean ;;
  10) requeue ;;
  *) clean; exit 1 ;;
esac
