"""Runs the cells of a study on this machine, several at a time, and prints one line per cell."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from maestro_scale.errors import MaestroError
from maestro_scale.escaping import printable
from maestro_scale.evaluation.run import score_text
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.study import data as study_data
from maestro_scale.study.cells import Cell
from maestro_scale.study.config import Data, Scale
from maestro_scale.study.processes import STOPPED, StopFlag, fork, last_error, num_gpus, poll, preload, wait
from maestro_scale.study.tracking import end_study
from maestro_scale.study.worker import LOCKED, LOG, run_cell, seconds_spent
from maestro_scale.training.run_dir import manifest_path

_POLL_S = 0.1
_RETRY_S = 10.0  # until a cell that another study runs is tried again


class StudyError(MaestroError):
    """The study cannot be run as requested; the message says what to do."""


@dataclass(frozen=True)
class RunOptions:
    """How cells are run. ``jobs``: at a time; ``threads``: of each, 0: the cores divided by the jobs; ``slim``: keep
    only the weights of finished cells."""

    study: str
    root: Path
    jobs: int = 1
    threads: int = 0
    slim: bool = False

    @property
    def study_dir(self) -> Path:
        """The folder of the study's own files."""
        return self.root / "studies" / self.study

    @property
    def num_threads(self) -> int:
        """Compute threads of a cell."""
        return self.threads or max(1, (os.cpu_count() or 1) // self.jobs)


@dataclass
class Outcome:
    """What a call of ``run_cells`` did. ``failures``: a line per failed cell."""

    finished: int = 0
    failures: list[str] = field(default_factory=list)
    is_stopped: bool = False

    @property
    def exit_code(self) -> int:
        """0, 1 after a failure, STOPPED after a signal."""
        return STOPPED if self.is_stopped else int(bool(self.failures))


@dataclass(frozen=True)
class _Running:
    cell: Cell
    slot: int


def run_cells(
    cells: Sequence[Cell],
    scale: Scale,
    options: RunOptions,
    stop: StopFlag | None = None,
    is_whole: bool = True,
) -> Outcome:
    """Run every cell that is not finished. A failed cell does not stop the others; a signal stops all, and the same
    call continues. ``cells``: distinct; ``is_whole``: they are the whole study, whose run in MLflow then ends."""
    stop = stop or StopFlag().install()
    missing = [cell for cell in cells if not cell.is_finished]
    done = len(cells) - len(missing)
    for data in _data_of(cells).values():
        study_data.remove_leftovers(data, options.root)
    outcome = Outcome()
    _print(f"{options.study}: {len(cells)} cells, {done} finished, in {options.root}")
    if not missing:
        return outcome
    if not _write_data(missing, options, stop):
        return replace(outcome, is_stopped=stop.is_set, failures=[] if stop.is_set else ["data"])
    environment = _environments(scale, options)
    if scale.gpu is None:
        preload(options.num_threads)
    # Only now: the parents keep what they had at the fork.
    pending, later = deque(missing), deque[Cell]()
    running: dict[int, _Running] = {}
    free, retry_at = deque(range(options.jobs)), 0.0
    while pending or later or running:
        if stop.is_set:
            pending.clear()
            later.clear()
        elif later and time.monotonic() >= retry_at:
            pending.extend(later)
            later.clear()
        while pending and free and not stop.is_set:
            cell, slot = pending.popleft(), free.popleft()
            running[_start(cell, options, environment[slot], stop)] = _Running(cell, slot)
        for pid in list(running):
            if (code := poll(pid)) is None:
                continue
            stop.children.discard(pid)
            ended = running.pop(pid)
            free.append(ended.slot)
            if code == LOCKED:
                later.append(ended.cell)
                retry_at = time.monotonic() + _RETRY_S
            else:
                done = _report(ended.cell, code, outcome, done, len(cells))
        time.sleep(_POLL_S)
    outcome.is_stopped = stop.is_set
    if is_whole and not stop.is_set:
        end_study(list(cells), options.study_dir, not outcome.failures)
    return outcome


def check_data(cells: Sequence[Cell]) -> None:
    """StudyError where a cell was trained, or may have been evaluated, on other samples than those that its shards hold
    now: it would be compared with cells that are run after their replacement. A split that was added, or that the cell
    does not use, does not matter."""
    present: dict[str, Manifest | None] = {}
    for cell in cells:
        trained = manifest_path(cell.directory, 0, cell.data.dataset)
        if cell.data.shards is None or not trained.exists():
            continue
        if cell.data.shards not in present:
            present[cell.data.shards] = _manifest(cell.data.shards)
        if (now := present[cell.data.shards]) is None:
            continue
        before = Manifest.loads(trained.read_bytes(), str(trained))
        changed = sorted(
            split
            for split in _splits(cell) & {*before.splits}
            if split not in now.splits or before.digest_of((split,)) != now.digest_of((split,))
        )
        if changed:
            raise StudyError(
                f"{cell.data.shards} holds other samples than when {cell.name} was trained "
                f"(split {', '.join(changed)}): restore them, give another --root, "
                f"or remove {cell.directory} and the other cells of these data"
            )


def _splits(cell: Cell) -> set[str]:
    """The splits of its shards that a cell is trained and evaluated on."""
    evaluated = (
        name
        for e in cell.evaluations
        if e.data.shards == cell.data.shards
        for role in ("train", "val", "test")
        for name in e.splits.get(role, (role,))
    )
    return {*cell.recipe.data.mixture[0].split, *evaluated}


def _manifest(address: str) -> Manifest | None:
    """None where it cannot be read; the stages of a cell report that."""
    try:
        return Manifest.load(address)
    except MaestroError:
        return None


def _start(cell: Cell, options: RunOptions, environment: dict[str, str], stop: StopFlag) -> int:
    def work() -> int:
        os.environ.update(environment)
        return run_cell(cell, options.study, options.study_dir, options.slim, options.num_threads)

    pid = fork(work, cell.directory / LOG, session=True)
    stop.children.add(pid)
    return pid


def _environments(scale: Scale, options: RunOptions) -> list[dict[str, str]]:
    """The environment variables of each slot: threads, and one GPU each."""
    common = {"OMP_NUM_THREADS": str(options.num_threads)}
    if scale.gpu is None:
        return [common] * options.jobs
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else [str(i) for i in range(num_gpus())]
    if len(gpus) < options.jobs:
        raise StudyError(
            f"--jobs {options.jobs}: a cell uses a GPU, and this machine has {len(gpus)}: use fewer"
        )
    return [{**common, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[: options.jobs]]


def _write_data(cells: Sequence[Cell], options: RunOptions, stop: StopFlag) -> bool:
    """Write the synthetic data that the cells read; false after a failure or a signal."""
    for data in _data_of(cells).values():
        address = study_data.place(data, options.root)
        if study_data.is_complete(data, options.root):
            continue
        _print(f"writing {sum(data.tiles.values())} synthetic tiles of {data.dataset} to {address}")

        def write(data=data) -> int:  # type: ignore[no-untyped-def]  # the default binds the variable of the loop
            study_data.write(data, options.root, workers=max(1, options.jobs))
            return 0

        if wait(fork(write, None), stop) or stop.is_set:
            return False
    return True


def _data_of(cells: Sequence[Cell]) -> dict[str, Data]:
    """All data that the cells read, each once."""
    used = (data for c in cells for data in (c.data, *(e.data for e in c.evaluations)))
    return {json.dumps(study_data.identity(data), sort_keys=True): data for data in used}


def _report(cell: Cell, code: int, outcome: Outcome, done: int, total: int) -> int:
    """Print how a cell ended; returns the number of finished cells."""
    if code == 0:
        outcome.finished += 1
        done += 1
        seconds = sum(seconds_spent(cell).values())
        _print(f"[{done}/{total}] {cell.label}: {_scores(cell)}, {seconds:.0f} s, {cell.name}")
    elif code == STOPPED:
        _print(f"stopped: {cell.label}; the same command continues it")
    else:
        log = cell.directory / LOG
        outcome.failures.append(f"failed: {cell.label}: {last_error(log)} (exit code {code}), log {log}")
        print(printable(outcome.failures[-1]), file=sys.stderr, flush=True)
    return done


def _scores(cell: Cell) -> str:
    texts = []
    for evaluation in cell.evaluations:
        if (result := evaluation.load()) is not None:
            fraction = "" if evaluation.fraction == 1 else f" {100 * evaluation.fraction:g}%"
            texts.append(f"{evaluation.mode}{fraction} {score_text(result)}")
    return ", ".join(texts)


def _print(line: str) -> None:
    print(printable(line), flush=True)
