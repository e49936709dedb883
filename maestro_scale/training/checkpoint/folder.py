"""The folder of a run's checkpoints: ``step_00001234``, …, those being written, and those found damaged."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.commit import MARKER
from maestro_scale.training.checkpoint.mirror import step_of
from maestro_scale.training.checkpoint.record import CheckpointError
from maestro_scale.training.checkpoint.retention import Retention

STATE = "state"
_STAGING = ".staging"
_DAMAGED = "damaged"
_STEP = re.compile(r"step_\d{8,}")

log = logging.getLogger(__name__)


def staging_of(final: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return final.with_name(f"{_STAGING}_{final.name}")


def replaced_of(final: Path) -> Path:
    """Where a checkpoint of this name goes while another one takes its place."""
    return final.with_name(f"{_STAGING}_replaced_{final.name}")


def committed(folder: Path) -> list[Path]:
    """The checkpoints with a marker, oldest first."""
    if not folder.is_dir():
        return []
    steps = (p for p in folder.iterdir() if _STEP.fullmatch(p.name))
    return sorted((p for p in steps if (p / MARKER).exists()), key=step_of)


def newest_intact(folder: Path, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint with a valid marker and file sizes, with ``hashes`` also contents, or None; the problems
    of newer ones)."""
    problems: list[str] = []
    for path in reversed(committed(folder)):
        problem = commit.problem(path, hashes)
        if problem is None:
            return path, problems
        problems.append(f"{path.name}: {problem}")
    return None, problems


def newest(run_dir: Path) -> Path:
    """The newest checkpoint of a run whose files match their hashes; CheckpointError if there is none.

    A warning where a newer one is damaged: its score or its model would be taken for that of the whole run.
    """
    path, problems = newest_intact(run_dir / "checkpoints", hashes=True)
    if path is None:
        raise CheckpointError(
            f"{run_dir} contains no intact checkpoint{': ' + problems[0] if problems else _hint(run_dir)}"
        )
    if problems and os.environ.get("RANK", "0") == "0":  # every rank of an evaluation gets here
        log.warning(
            "%s: %s is used, since newer ones are damaged: %s", run_dir, path.name, "; ".join(problems)
        )
    return path


def _hint(run_dir: Path) -> str:
    """Why a folder has no checkpoint, where that is easily seen."""
    if not run_dir.exists():
        return ": it does not exist"
    if (run_dir / "config.json").exists():
        return ": it is an exported model"
    if committed(run_dir):
        return f": it is the folder of checkpoints; give the run directory, {run_dir.parent}"
    if not (run_dir / "recipe.yaml").exists():
        return ": it is not a run directory"
    return ": the run has not saved one yet"


def rename_damaged(folder: Path, loaded: Path) -> None:
    """Rename the checkpoints after ``loaded``, which are damaged. Left in place, they would count towards
    ``checkpoint.keep`` and be the newest again at the next start."""
    for path in committed(folder):
        if step_of(path) > step_of(loaded):
            aside = folder / f"{_DAMAGED}_{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def prune(folder: Path, retention: Retention, in_use: Collection[str]) -> None:
    """Remove superseded checkpoints, except those of the names ``in_use``, and what a kill has left."""
    found = {step_of(p): p for p in committed(folder)}
    for step in retention.superseded(found):
        if found[step].name in in_use:
            continue  # removed after a later checkpoint
        (found[step] / MARKER).unlink()  # first, so that a kill in between leaves no valid marker
        shutil.rmtree(found[step])
    for stray in folder.iterdir():
        incomplete = _STEP.fullmatch(stray.name) and not (stray / MARKER).exists()
        if incomplete or stray.name.startswith(_STAGING):  # only names that checkpoints are written under
            shutil.rmtree(stray, ignore_errors=True)
