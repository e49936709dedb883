# shellcheck shell=bash
# Functions and settings shared by the SLURM scripts, which source this file under bash -u. Environment variables:
#
#   MAESTRO_HOME   this checkout                 default: the folder where sbatch was called, else that of the script
#   MAESTRO_ENV    the Python environment: one or more of these, separated by ';' and activated in order:
#                  module:NAME[,NAME…]  conda:NAME  folder of a venv  folder of a conda environment  file to source
#   MAESTRO_IMAGE  container for the tasks: FILE.sif runs under Apptainer, anything else is passed to srun as Pyxis'
#                  --container-image. Mounted are this checkout, the working directory, the folders of the recipe, the
#                  run and the data, MAESTRO_DATA and MAESTRO_CACHE; MAESTRO_MOUNTS lists more (a:b,c:d)
#   MAESTRO_IFNAME network interface of the nodes   default: on each node, the one that routes to the other nodes
#   MAESTRO_PORT   rendezvous port                  default: a free port of the first node, derived from the job id
#   MAESTRO_CACHE  node-local shard cache           default: created for this job under MAESTRO_LOCAL ($SLURM_TMPDIR,
#                  $TMPDIR or /tmp), and removed when the job ends
#   MAESTRO_CHECK  1: print what would run (nodes, ranks, commands, mounts, data), and exit; also without SLURM
#   MAESTRO_CPU_BIND  srun's --cpu-bind on GPU nodes   default: none, as each rank binds itself to the CPUs next to its GPU
#   NCCL_…, GLOO_…, OMP_NUM_THREADS, MLFLOW_TRACKING_URI, AWS_…: are passed on to the tasks unchanged

MAESTRO_HOME=$(cd "$MAESTRO_HOME" && pwd) # absolute: it is mounted, and passed to tasks

say() { printf '[%(%F %T)T %s] %s\n' -1 "${SLURMD_NODENAME:-$(uname -n)}" "$*"; }

# die STATUS MESSAGE: exit with an error message, so that the last line of a log says what is wrong and what to do.
die() {
  say "error: $2" >&2
  exit "$1"
}

activate() {
  local entries entry modules
  IFS=';' read -r -a entries <<<"${MAESTRO_ENV:-}"
  set +u # activation scripts of other software often fail under -u
  for entry in ${entries[@]+"${entries[@]}"}; do
    case "$entry" in
      module:*)
        command -v module >/dev/null || die 2 "MAESTRO_ENV=$entry, but this node has no \`module\` command"
        IFS=',' read -r -a modules <<<"${entry#module:}"
        module load "${modules[@]}" || die 2 "module load ${modules[*]} failed: see \`module avail\`"
        ;;
      conda:*)
        command -v conda >/dev/null || die 2 "MAESTRO_ENV=$entry, but this node has no \`conda\` command"
        eval "$(conda shell.bash hook)"
        conda activate "${entry#conda:}" || die 2 "conda activate ${entry#conda:} failed: see \`conda env list\`"
        ;;
      *)
        if [ -f "$entry/bin/activate" ]; then
          # shellcheck disable=SC1091 # a file of the user
          . "$entry/bin/activate"
        elif [ -d "$entry/conda-meta" ]; then
          export PATH="$entry/bin:$PATH" CONDA_PREFIX="$entry"
        elif [ -f "$entry" ]; then
          # shellcheck disable=SC1090 # a file of the user
          . "$entry"
        else
          die 2 "MAESTRO_ENV: $entry is not a venv, conda environment or file on $(uname -n); is it on a shared disk?"
        fi
        ;;
    esac
  done
  set -u
}

FOLDERS=() # more folders that a container must see

# see PATH…: a container must see these folders, and the folders of these files. Addresses are passed over, and so is /.
see() {
  local path
  for path in "$@"; do
    case "$path" in *://*) continue ;; esac
    [ -d "$path" ] || path=$(dirname -- "$path")
    [ ! -d "$path" ] || path=$(cd -- "$path" && pwd)
    [ ! -d "$path" ] || [ "$path" = / ] || FOLDERS+=("$path")
  done
}

# see_recipe RANKS RECIPE OVERRIDE…: a container must see what the recipe names; sets RUNS, the parent of its run directory.
# After `prepare`, and `enter_image` must follow. Fails where the recipe cannot be used.
see_recipe() {
  local ranks=$1 listed folder
  shift
  listed=$(run_python -m maestro_scale.cluster.preflight folders "$ranks" --recipe "$@") || return 1
  # shellcheck disable=SC2034 # for pretrain_multinode.sh
  RUNS=${listed%%$'\n'*}
  while IFS= read -r folder; do FOLDERS+=("$folder"); done <<<"$listed"
}

# Set CONTAINER (command prefix before python) and STEP (options of srun) for the container image.
enter_image() {
  CONTAINER=() STEP=()
  [ -n "${MAESTRO_IMAGE:-}" ] || return 0
  local mounts="" folder
  for folder in "$MAESTRO_HOME" "$PWD" "${MAESTRO_DATA:-}" "$([ "${CACHE_IS_OURS:-0}" = 1 ] || echo "${MAESTRO_CACHE:-}")" ${FOLDERS[@]+"${FOLDERS[@]}"}; do
    [ -d "$folder" ] || continue # not set, or an address
    case "$folder" in
      *[:,]*) say "warning: $folder cannot be mounted: its name contains ':' or ','" >&2; continue ;;
    esac
    case ",$mounts," in *",$folder:$folder,"*) ;; *) mounts="${mounts:+$mounts,}$folder:$folder" ;; esac
  done
  mounts="$mounts${MAESTRO_MOUNTS:+,$MAESTRO_MOUNTS}${LOCAL_DIR:+,$LOCAL_DIR:$LOCAL_DIR}"
  # shellcheck disable=SC2034 # for MAESTRO_CHECK
  MOUNTS=$mounts
  case "$MAESTRO_IMAGE" in
    *.sif)
      [ -f "$MAESTRO_IMAGE" ] || die 2 "MAESTRO_IMAGE: $MAESTRO_IMAGE does not exist on $(uname -n)"
      local program
      program=$(command -v apptainer || command -v singularity) || die 2 "MAESTRO_IMAGE is a .sif, but this node has no apptainer"
      CONTAINER=("$program" exec --bind "$mounts" --pwd "$PWD")
      [ -z "${SLURM_GPUS_ON_NODE:-}" ] || CONTAINER+=(--nv)
      CONTAINER+=("$MAESTRO_IMAGE")
      ;;
    *) STEP=(--container-image="$MAESTRO_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD") ;;
  esac
}

# Run `python ARGS` on this node, in the environment of the tasks.
run_python() {
  if [ ${#STEP[@]} -gt 0 ] && [ "$CHECK_OUTSIDE" = 0 ]; then
    srun --overlap --nodes=1 --ntasks=1 --quiet "${STEP[@]}" "$PYTHON" "$@"
  else
    ${CONTAINER[@]+"${CONTAINER[@]}"} "$PYTHON" "$@"
  fi
}

# shellcheck disable=SC2034 # the scripts read CACHE_IS_OURS to decide whether to remove the cache
# Activate the environment, create the cache, and check that Python can import maestro_scale.
prepare() {
  activate
  PYTHON=${MAESTRO_PYTHON:-python3}
  export PYTHONPATH="$MAESTRO_HOME${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  LOCAL_DIR="" CACHE_IS_OURS=0
  if [ -z "${MAESTRO_CACHE:-}" ]; then
    LOCAL_DIR=${MAESTRO_LOCAL:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}
    export MAESTRO_CACHE="$LOCAL_DIR/maestro-${USER:-$(id -un)}-${SLURM_JOB_ID:-$$}"
    CACHE_IS_OURS=1
  fi
  local mode=()
  [ "$CACHE_IS_OURS" = 0 ] || mode=(-m 700)
  mkdir -p ${mode[@]+"${mode[@]}"} "$MAESTRO_CACHE" 2>/dev/null || die 2 "cannot create the cache $MAESTRO_CACHE on $(uname -n): set MAESTRO_LOCAL to a folder on its local disk with free space"
  # Its name can be guessed, and everybody can write to /tmp: another user could put shards there that count as verified.
  if [ "$CACHE_IS_OURS" = 1 ] && { [ -L "$MAESTRO_CACHE" ] || [ ! -O "$MAESTRO_CACHE" ]; }; then
    die 2 "the cache $MAESTRO_CACHE on $(uname -n) belongs to another user: set MAESTRO_LOCAL to a folder of your own on a local disk"
  fi
  enter_image
  run_python -c 'import maestro_scale' 2>/dev/null ||
    die 2 "$PYTHON cannot import maestro_scale: set MAESTRO_ENV to a venv or conda environment where it was installed (or set MAESTRO_IMAGE)"
}

# Export MASTER_PORT. This script runs on the node of rank 0. After `prepare`.
rendezvous_port() {
  MASTER_PORT=${MAESTRO_PORT:-$(run_python -m maestro_scale.cluster.port "$SLURM_JOB_ID")} ||
    die 2 "no free port on $(uname -n): set MAESTRO_PORT"
  export MASTER_PORT
}

# With MAESTRO_CHECK=1 outside of a job: pretend to have one of as many nodes and tasks as the script asks for.
CHECK_OUTSIDE=0
pretend_job() {
  [ "${MAESTRO_CHECK:-0}" = 1 ] && [ -z "${SLURM_JOB_ID:-}" ] || return 0
  CHECK_OUTSIDE=1
  SLURM_JOB_ID=0 SLURM_JOB_NUM_NODES=${SLURM_JOB_NUM_NODES:-$1}
  export SLURM_JOB_ID
}

# Set NODES to the names of the job's nodes. After `pretend_job`.
list_nodes() {
  local i
  NODES=()
  if [ "$CHECK_OUTSIDE" = 0 ]; then
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  else
    for ((i = 1; i <= SLURM_JOB_NUM_NODES; i++)); do NODES+=("NODE$i"); done
  fi
}

# warn_short SIGNAL_S: warn where the job's time limit leaves hardly any time before the signal that is sent SIGNAL_S before.
warn_short() {
  local end left
  end=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' | head -n 1)
  end=$(date -d "$end" +%s 2>/dev/null) || return 0 # no limit
  left=$((end - $(date +%s)))
  [ "$left" -ge $((2 * $1)) ] ||
    say "warning: this job ends in $left s and is asked to save and stop $1 s before: it will train for a few steps per start at most; use a longer --time"
}

# check_line NAME VALUE…: a line of the check
check_line() { printf '%-9s %s\n' "$1" "${*:2}"; }

need_slurm() {
  [ -n "${SLURM_JOB_ID:-}" ] ||
    die 2 "no SLURM job here: start this with \`sbatch ${1:-slurm/pretrain_multinode.sh} …\`; without SLURM see docs/clusters.md (torchrun, deepspeed)"
}
