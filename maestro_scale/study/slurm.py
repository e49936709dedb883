"""A study as a SLURM array: one task per cell that is not finished, then a job that writes the result."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from maestro_scale.study.run import StudyError
from maestro_scale.training.run_dir import write_atomically

SCRIPT = Path(__file__).parents[2] / "slurm" / "study.sh"


def submit(
    names: Sequence[str], words: Sequence[str], root: Path, limit: int, options: Sequence[str]
) -> tuple[str, str]:
    """Submit the cells by their names; returns the ids of the array and of the job that writes the result.

    The tasks find the names in a file below ``root``, by their numbers in the array: the file of the study may be
    changed while they wait, and the number of a cell with it.

    ``words``: the arguments of ``maestro-scale study``; ``limit``: largest number of tasks at a time, 0: none;
    ``options``: of sbatch. StudyError where sbatch is missing or refuses.
    """
    if shutil.which("sbatch") is None:
        raise StudyError("--slurm: this machine has no sbatch; run the cells here, or use --print")
    if not SCRIPT.is_file():
        raise StudyError(f"--slurm needs {SCRIPT}, which is in the checkout: install with pip install -e")
    logs = root / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{name}\n" for name in names)
    # Named by its content, so that a later array of other cells does not replace it.
    listed = logs / f"cells-{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
    write_atomically(listed, text)
    array = f"--array=0-{len(names) - 1}" + (f"%{limit}" if limit else "")
    first = _sbatch([array, f"--output={logs}/%x-%A_%a.log", *options], [*words, "--cells", str(listed)])
    after = [
        f"--dependency=afterany:{first}",
        f"--output={logs}/%x-%j.log",
        "--job-name=maestro-study-report",
    ]
    return first, _sbatch([*after, *options], [*words, "--report"])


def _sbatch(options: Sequence[str], words: Sequence[str]) -> str:
    command = ["sbatch", "--parsable", *options, str(SCRIPT), *words]
    env = {**os.environ, "MAESTRO_HOME": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise StudyError(f"sbatch refused the study: {lines[-1]}")
    return done.stdout.strip().partition(";")[0]
