#!/usr/bin/env bash
# Evaluate a model on benchmarks x modes x fractions x seeds, one task each, then write the report:
#
#   bash slurm/evaluate.sh --checkpoint RUN|MODEL --out RESULTS [options] [-- options of sbatch]
#
#   --recipes "A.yaml B.yaml"   benchmarks           default: recipes/eval/*.yaml
#   --modes "knn probe"                              default: knn probe
#   --fractions "1 0.1"         of the training labels   default: 1
#   --seeds "0 1 2"                                  default: 0
#   --baseline NAME             instead of --checkpoint
#
# MAESTRO_CHECK=1 prints what would be submitted, and exits.
# Submits one array job and, after it, a job for `maestro-scale report`; prints both job ids. A requeued task resumes.
# With more than one GPU or task per node (-- --gpus-per-node=8) an evaluation runs on all of them.
# Settings: slurm/env.sh, docs/clusters.md.
#SBATCH --job-name=maestro-eval
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -uo pipefail

MAESTRO_HOME=${MAESTRO_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
[ -f "$MAESTRO_HOME/slurm/env.sh" ] || MAESTRO_HOME=${SLURM_SUBMIT_DIR:-}
[ -f "$MAESTRO_HOME/slurm/env.sh" ] || { echo "error: set MAESTRO_HOME to the checkout of maestro_scale" >&2; exit 2; }
export MAESTRO_HOME
# shellcheck source=slurm/env.sh
. "$MAESTRO_HOME/slurm/env.sh"

RECIPES="" MODES="knn probe" FRACTIONS="1" SEEDS="0" OUT="" ENCODER=() REPORT=0
WORDS=("$@")
while [ $# -gt 0 ]; do
  case "$1" in
    --checkpoint | --baseline) ENCODER=("$1" "${2:?}") ;;
    --recipes) RECIPES=${2:?} ;;
    --modes) MODES=${2:?} ;;
    --fractions) FRACTIONS=${2:?} ;;
    --seeds) SEEDS=${2:?} ;;
    --out) OUT=${2:?} ;;
    --report) REPORT=1; shift; continue ;; # set when the script submits itself after the array
    --) shift; break ;;
    *) die 2 "$1 is not an option; see the first lines of slurm/evaluate.sh" ;;
  esac
  shift 2
done
[ ${#ENCODER[@]} -gt 0 ] || die 2 "no model: use --checkpoint RUN_DIR or an exported model, or --baseline NAME"
[ -n "$OUT" ] || die 2 "no output folder: use --out FOLDER on a disk that all nodes share"
[ -n "$RECIPES" ] || RECIPES=$(printf '%s\n' "$MAESTRO_HOME"/recipes/eval/*.yaml)

# The task table: one line per recipe, mode, fraction and seed. Recipes are separated by newlines if names contain spaces.
TASKS=()
case "$RECIPES" in *$'\n'*) mapfile -t LIST <<<"$RECIPES" ;; *) read -r -a LIST <<<"$RECIPES" ;; esac
[ ! -f "$RECIPES" ] || LIST=("$RECIPES") # a single recipe, whose name may contain spaces
for recipe in "${LIST[@]}"; do
  [ -f "$recipe" ] || die 2 "recipe $recipe does not exist"
  for mode in $MODES; do for fraction in $FRACTIONS; do for seed in $SEEDS; do
    TASKS+=("$recipe"$'\t'"$mode"$'\t'"$fraction"$'\t'"$seed")
  done; done; done
done

[ "${MAESTRO_CHECK:-0}" = 1 ] || mkdir -p "$OUT" 2>/dev/null
see "$OUT" "${ENCODER[1]#*:}" "$(dirname -- "${ENCODER[1]%/checkpoints/*}")" # MLflow's store is beside the run

if [ "$REPORT" = 1 ]; then
  prepare
  run_python -m maestro_scale.cli report "$OUT" --out "$OUT/report.html" || die 1 "the report failed: see the lines above"
  say "report: $OUT/report.html"
  exit 0
fi

# Activate the environment, with what $recipe names in the container.
enter_recipe() {
  see "$recipe"
  prepare
  [ -n "${MAESTRO_IMAGE:-}" ] || return 0
  see_recipe 1 "$recipe" || die 2 "the recipe cannot be used; see the lines above"
  enter_image
}

if [ "${MAESTRO_CHECK:-0}" = 1 ]; then
  for task in "${!TASKS[@]}"; do check_line "task $task" "${TASKS[$task]//$'\t'/, }"; done
  check_line encoder "${ENCODER[*]}"
  check_line results "$OUT, then $OUT/report.html"
  pretend_job 1
  IFS=$'\t' read -r recipe _ <<<"${TASKS[0]}"
  enter_recipe
  check_line mounts "${MOUNTS:-none: no MAESTRO_IMAGE} (of task 0)"
  [ "$CACHE_IS_OURS" = 0 ] || rm -rf "$MAESTRO_CACHE"
  check_line sbatch "--array=0-$((${#TASKS[@]} - 1)) $*"
  say "nothing was submitted (MAESTRO_CHECK=1)"
  exit 0
fi

if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  command -v sbatch >/dev/null || die 2 "this machine has no sbatch; without SLURM: deepspeed maestro_scale/evaluate.py --help"
  mkdir -p "$OUT" || die 2 "cannot write to $OUT"
  WORDS=("${WORDS[@]:0:${#WORDS[@]}-$#}")
  [ $# = 0 ] || unset 'WORDS[-1]' # the --
  LOG=(--output "$OUT/%x-%A_%a.log")
  ARRAY=$(sbatch --parsable --array="0-$((${#TASKS[@]} - 1))" "${LOG[@]}" "$@" "$MAESTRO_HOME/slurm/evaluate.sh" "${WORDS[@]}") ||
    die 1 "sbatch refused the array"
  LAST=$(sbatch --parsable --dependency="afterany:$ARRAY" --job-name=maestro-report --output "$OUT/%x-%j.log" \
    "$MAESTRO_HOME/slurm/evaluate.sh" "${WORDS[@]}" --report) || die 1 "sbatch refused the report"
  say "array $ARRAY of ${#TASKS[@]} evaluations, then report $LAST: $OUT/report.html"
  exit 0
fi

IFS=$'\t' read -r recipe mode fraction seed <<<"${TASKS[$SLURM_ARRAY_TASK_ID]}"
enter_recipe
PER_NODE=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
PER_NODE=${PER_NODE%%(*}
CPUS=$((${SLURM_CPUS_ON_NODE:-1} / PER_NODE)) # srun gives a task one CPU unless told otherwise
[ "$CPUS" -ge 1 ] || die 2 "$PER_NODE tasks on ${SLURM_CPUS_ON_NODE:-1} CPUs: ask for fewer, or for more CPUs"
rendezvous_port
export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
BIND=() # see pretrain_multinode.sh
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || BIND=(--cpu-bind="${MAESTRO_CPU_BIND:-none}")
NAME=$(basename "$recipe" .yaml)
FOLDER="$OUT/$NAME/$mode-$fraction-seed$seed"
say "$NAME, $mode, $fraction of the labels, seed $seed, on $PER_NODE tasks -> $FOLDER"
srun --nodes=1 --ntasks="$PER_NODE" --cpus-per-task="$CPUS" --kill-on-bad-exit=1 --quiet ${BIND[@]+"${BIND[@]}"} ${STEP[@]+"${STEP[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} \
  "$PYTHON" -m maestro_scale.cluster.launch "$MAESTRO_HOME/maestro_scale/evaluate.py" --recipe "$recipe" "${ENCODER[@]}" \
  --mode "$mode" --fraction "$fraction" --out "$FOLDER" --features "$OUT/features" --set "seed=$seed"
STATUS=$?
[ "$CACHE_IS_OURS" = 0 ] || rm -rf "$MAESTRO_CACHE"
[ "$STATUS" = 0 ] || die 1 "$NAME, $mode, $fraction, seed $seed failed; to repeat only this task: sbatch --array=$SLURM_ARRAY_TASK_ID slurm/evaluate.sh …same arguments…"
