# shellcheck shell=bash
# What the SLURM scripts share; sourced by them, under bash -u. All of it is set from outside:
#
#   MAESTRO_HOME   this checkout                 default: where sbatch was called, else where the script lay
#   MAESTRO_ENV    the Python environment, one or several of these, separated by ';', in this order:
#                  module:NAME[,NAME…]  conda:NAME  a venv's folder  a conda environment's folder  a file to source
#   MAESTRO_IMAGE  a container for the tasks: FILE.sif runs under Apptainer, anything else goes to srun as Pyxis'
#                  --container-image; MAESTRO_MOUNTS lists more paths for it to see (a:b,c:d)
#   MAESTRO_IFNAME network interface of the nodes   default: the one that leads to the other nodes, found on each
#   MAESTRO_PORT   rendezvous port                  default: from the job id
#   MAESTRO_CACHE  node-local folder for shards     default: made under MAESTRO_LOCAL (default $SLURM_TMPDIR, $TMPDIR,
#                  /tmp) for this job, and removed at its end
#   NCCL_…, GLOO_…, OMP_NUM_THREADS, MLFLOW_TRACKING_URI, AWS_…: reach the tasks as they are

say() { printf '[%(%F %T)T %s] %s\n' -1 "${SLURMD_NODENAME:-$(uname -n)}" "$*"; }

# die STATUS MESSAGE: the last line of a log says what is wrong and what to do.
die() {
  say "error: $2" >&2
  exit "$1"
}

activate() {
  local entries entry modules
  IFS=';' read -r -a entries <<<"${MAESTRO_ENV:-}"
  set +u # what others wrote does not always run under -u
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
          # shellcheck disable=SC1091 # the user's
          . "$entry/bin/activate"
        elif [ -d "$entry/conda-meta" ]; then
          export PATH="$entry/bin:$PATH" CONDA_PREFIX="$entry"
        elif [ -f "$entry" ]; then
          # shellcheck disable=SC1090 # the user's
          . "$entry"
        else
          die 2 "MAESTRO_ENV: $entry is no venv, conda environment or file on $(uname -n); is it on a shared disk?"
        fi
        ;;
    esac
  done
  set -u
}

# Fills CONTAINER (words before python) and STEP (options of srun) for the image.
enter_image() {
  CONTAINER=() STEP=()
  [ -n "${MAESTRO_IMAGE:-}" ] || return 0
  local mounts="$MAESTRO_HOME:$MAESTRO_HOME,$PWD:$PWD${MAESTRO_MOUNTS:+,$MAESTRO_MOUNTS}"
  case "$MAESTRO_IMAGE" in
    *.sif)
      [ -f "$MAESTRO_IMAGE" ] || die 2 "MAESTRO_IMAGE: there is no $MAESTRO_IMAGE on $(uname -n)"
      local program
      program=$(command -v apptainer || command -v singularity) || die 2 "MAESTRO_IMAGE is a .sif, but this node has no apptainer"
      CONTAINER=("$program" exec --bind "$mounts${LOCAL_DIR:+,$LOCAL_DIR:$LOCAL_DIR}" --pwd "$PWD")
      [ -z "${SLURM_GPUS_ON_NODE:-}" ] || CONTAINER+=(--nv)
      CONTAINER+=("$MAESTRO_IMAGE")
      ;;
    *) STEP=(--container-image="$MAESTRO_IMAGE" --container-mounts="$mounts${LOCAL_DIR:+,$LOCAL_DIR:$LOCAL_DIR}" --container-workdir="$PWD") ;;
  esac
}

# python ARGS, here, in the environment of the tasks.
run_python() {
  if [ ${#STEP[@]} -gt 0 ]; then
    srun --overlap --nodes=1 --ntasks=1 --quiet "${STEP[@]}" "$PYTHON" "$@"
  else
    ${CONTAINER[@]+"${CONTAINER[@]}"} "$PYTHON" "$@"
  fi
}

# shellcheck disable=SC2034 # CACHE_IS_OURS tells the scripts whether to remove it
# Everything up to a Python that can import maestro_scale.
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
  mkdir -p "$MAESTRO_CACHE" 2>/dev/null || die 2 "cannot make the cache $MAESTRO_CACHE on $(uname -n): set MAESTRO_LOCAL to a folder on its local disk, with room"
  enter_image
  run_python -c 'import maestro_scale' 2>/dev/null ||
    die 2 "$PYTHON cannot import maestro_scale: set MAESTRO_ENV to a venv or conda environment where \`pip install\` put it (or MAESTRO_IMAGE)"
}

need_slurm() {
  [ -n "${SLURM_JOB_ID:-}" ] ||
    die 2 "no SLURM job here: start this with \`sbatch ${1:-slurm/pretrain_multinode.sh} …\`; without SLURM see docs/clusters.md (torchrun, deepspeed)"
}
