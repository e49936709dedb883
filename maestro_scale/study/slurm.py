"""A study as a SLURM array: one task per cell that is not finished, then a job that writes the result."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from maestro_scale.study.run import StudyError

SCRIPT = Path(__file__).parents[2] / "slurm" / "study.sh"


def submit(
    numbers: Sequence[int], words: Sequence[str], root: Path, limit: int, options: Sequence[str]
) -> tuple[str, str]:
    """Submit the cells by their numbers; returns the ids of the array and of the job that writes the result.

    ``words``: the arguments of ``maestro-scale study``; ``limit``: largest number of tasks at a time, 0: none;
    ``options``: of sbatch. StudyError where sbatch is missing or refuses.
    """
    if shutil.which("sbatch") is None:
        raise StudyError("--slurm: this machine has no sbatch; run the cells here, or use --print")
    if not SCRIPT.is_file():
        raise StudyError(f"--slurm needs {SCRIPT}, which is in the checkout: install with pip install -e")
    logs = root / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    array = f"--array={ranges(numbers)}" + (f"%{limit}" if limit else "")
    first = _sbatch([array, f"--output={logs}/%x-%A_%a.log", *options], words)
    after = [
        f"--dependency=afterany:{first}",
        f"--output={logs}/%x-%j.log",
        "--job-name=maestro-study-report",
    ]
    return first, _sbatch([*after, *options], [*words, "--report"])


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``, which keeps the argument of sbatch short."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _sbatch(options: Sequence[str], words: Sequence[str]) -> str:
    command = ["sbatch", "--parsable", *options, str(SCRIPT), *words]
    env = {**os.environ, "MAESTRO_HOME": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise StudyError(f"sbatch refused the study: {lines[-1]}")
    return done.stdout.strip().partition(";")[0]
