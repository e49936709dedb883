#!/usr/bin/env bash
# Shard one split on many nodes:  sbatch [--array=1-16] slurm/shard_dataset.sh DATASET RAW DST --split SPLIT [options of `maestro-scale shard`]
#
# Each task of the array writes one part; the last one to finish writes the manifest, which equals that of a single run.
# A part that failed can be repeated alone, with the same number of parts:
#   MAESTRO_PARTS=16 sbatch --array=7 slurm/shard_dataset.sh …same arguments…
# RAW must be visible to all nodes; DST is a shared folder or s3://. Settings: slurm/env.sh, docs/clusters.md.
#SBATCH --job-name=maestro-shard
#SBATCH --array=1-8
#SBATCH --cpus-per-task=2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -uo pipefail

MAESTRO_HOME=${MAESTRO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
if [ ! -f "$MAESTRO_HOME/slurm/env.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then # submitted from another folder
  MAESTRO_HOME=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/shard_dataset\.sh.*|\1|p' | head -n 1)
fi
[ -f "$MAESTRO_HOME/slurm/env.sh" ] || { echo "error: set MAESTRO_HOME to the checkout of maestro_scale" >&2; exit 2; }
export MAESTRO_HOME
# shellcheck source=slurm/env.sh
. "$MAESTRO_HOME/slurm/env.sh"

if [ "${MAESTRO_CHECK:-0}" = 1 ] && [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  pretend_job 1
  SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_MIN=1 SLURM_ARRAY_TASK_MAX=8 SLURM_ARRAY_TASK_COUNT=8 # as above
fi
need_slurm slurm/shard_dataset.sh
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || die 2 "this job is not an array: sbatch --array=1-8 slurm/shard_dataset.sh …"
[ $# -ge 3 ] || die 2 "usage: sbatch --array=1-8 slurm/shard_dataset.sh DATASET RAW DST --split SPLIT"
PARTS=${MAESTRO_PARTS:-$SLURM_ARRAY_TASK_MAX}
# shellcheck disable=SC2153 # SLURM sets it
if [ -z "${MAESTRO_PARTS:-}" ] && { [ "$SLURM_ARRAY_TASK_MIN" != 1 ] || [ "$SLURM_ARRAY_TASK_COUNT" != "$PARTS" ]; }; then
  die 2 "an array other than 1-N repeats some parts: set their total number with MAESTRO_PARTS=N"
fi
case "$3" in *://*) ;; *) [ "${MAESTRO_CHECK:-0}" = 1 ] || mkdir -p "$(dirname "$3")" 2>/dev/null ;; esac
see "$1" "$2" "$3"
prepare
if [ "${MAESTRO_CHECK:-0}" = 1 ]; then
  check_line part "$SLURM_ARRAY_TASK_ID of $PARTS"
  check_line mounts "${MOUNTS:-none: no MAESTRO_IMAGE}"
  check_line command "$(printf '%q ' maestro-scale shard "$@" --workers "${SLURM_CPUS_PER_TASK:-2}" --part "$SLURM_ARRAY_TASK_ID/$PARTS")"
  [ "$CACHE_IS_OURS" = 0 ] || rm -rf "$MAESTRO_CACHE"
  [ -e "$2" ] || die 2 "the raw data $2 does not exist on $(uname -n)"
  say "nothing was written (MAESTRO_CHECK=1)"
  exit 0
fi
say "part $SLURM_ARRAY_TASK_ID of $PARTS: $*"
run_python -m maestro_scale.cli shard "$@" --workers "${SLURM_CPUS_PER_TASK:-2}" --part "$SLURM_ARRAY_TASK_ID/$PARTS"
STATUS=$?
[ "$CACHE_IS_OURS" = 0 ] || rm -rf "$MAESTRO_CACHE"
[ "$STATUS" = 0 ] || die 1 "part $SLURM_ARRAY_TASK_ID failed; fix the errors above, then: MAESTRO_PARTS=$PARTS sbatch --array=$SLURM_ARRAY_TASK_ID slurm/shard_dataset.sh …"
say "part $SLURM_ARRAY_TASK_ID of $PARTS is written"
