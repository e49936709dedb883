#!/usr/bin/env bash
# Evaluate each new permanent checkpoint (checkpoint.keep_every) of a running training, in separate jobs:
#
#   sbatch slurm/follow.sh RUN_DIR [options of slurm/evaluate.sh, without --checkpoint and --out]
#   bash slurm/follow.sh --once RUN_DIR …        the existing checkpoints, without waiting for new ones
#
# Results are in RUN_DIR/evaluations/step_NNNNNNNN. Ends when the run is done and its last permanent checkpoint submitted.
# MAESTRO_FOLLOW_S: polling interval in seconds (60).
#SBATCH --job-name=maestro-follow
#SBATCH --ntasks=1
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

[ "${MAESTRO_CHECK:-0}" = 0 ] || die 2 "MAESTRO_CHECK: use MAESTRO_CHECK=1 bash slurm/evaluate.sh … for its evaluations"

ONCE=0
[ "${1:-}" != --once ] || { ONCE=1; shift; }
[ $# -gt 0 ] && [ -d "$1" ] || die 2 "no run directory: slurm/follow.sh RUN_DIR"
RUN_DIR=$1
shift
[ -z "${SLURM_JOB_ID:-}" ] || unset "${!SLURM_@}" # the submitted jobs must not inherit the SLURM variables of this one
prepare
[ "$CACHE_IS_OURS" = 0 ] || export -n MAESTRO_CACHE # nor the cache of this one, which is removed at its end
if [ ! -f "$RUN_DIR/recipe.yaml" ] && [ "$ONCE" = 0 ]; then # submitted with the training, which writes it at its start
  say "waiting for the training to start in $RUN_DIR"
  until [ -f "$RUN_DIR/recipe.yaml" ]; do sleep "${MAESTRO_FOLLOW_S:-60}"; done
fi
while :; do
  # Read the outcome before listing checkpoints: a run that is done by now has written all of them.
  OVER=0
  grep -qs '"reason": "done"' "$RUN_DIR/outcome.json" && OVER=1
  FOUND=$(run_python -m maestro_scale.cluster.permanent "$RUN_DIR") || die 2 "$RUN_DIR cannot be followed; see the line above"
  while IFS= read -r checkpoint; do
    [ -n "$checkpoint" ] || continue
    out="$RUN_DIR/evaluations/$(basename "$checkpoint")"
    [ -e "$out/submitted" ] && continue
    mkdir -p "$out"
    bash "$MAESTRO_HOME/slurm/evaluate.sh" --checkpoint "$checkpoint" --out "$out" "$@" || die 1 "could not submit the evaluation of $checkpoint"
    touch "$out/submitted"
  done <<<"$FOUND"
  [ "$OVER" = 0 ] && [ "$ONCE" = 0 ] || break
  sleep "${MAESTRO_FOLLOW_S:-60}"
done
[ "$CACHE_IS_OURS" = 0 ] || rm -rf "$MAESTRO_CACHE"
say "all permanent checkpoints of $RUN_DIR are submitted"
