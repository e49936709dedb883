"""Runs one cell: pretraining, evaluations and MLflow, each stage by the entry points train.py and evaluate.py.

Files of a cell, beside those of a run directory: ``cell.json`` (what its hash is of), ``cell.yaml`` (the recipe that
is given to train.py), ``log.txt``, ``cost.json`` (seconds by stage), ``machines.json`` (threads and device by stage),
``evaluations/``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from maestro_scale import untrusted
from maestro_scale.shards.locks import Locked, file_lock
from maestro_scale.study.cells import SCRATCH, TRAINED_MODES, Cell, Evaluation
from maestro_scale.study.processes import STOPPED, StopFlag, device_kind, fork, run_entry, wait
from maestro_scale.study.tracking import record_cell
from maestro_scale.training.checkpoint.folder import newest
from maestro_scale.training.run_dir import has_finished, write_atomically

FAILED, LOCKED = 1, 75
LOG, COST, MACHINES = "log.txt", "cost.json", "machines.json"
_MODEL = "model"
_MAX_SECONDS = 1e10  # of a stage; other numbers are damage
_LOCK = ".cell.lock"


def run_cell(cell: Cell, study: str, study_dir: Path, slim: bool, threads: int) -> int:
    """Run what is missing of a cell. Returns 0, FAILED, STOPPED, or LOCKED if another process runs the cell.

    ``slim``: afterwards keep the exported weights instead of the checkpoint with the optimizer state.
    """
    stop = StopFlag().install()
    cell.directory.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(cell.directory / _LOCK, wait=False):
            code = _run_stages(cell, stop, threads)
            if code == 0:
                record_cell(cell, study, study_dir)
                shutil.rmtree(cell.directory / "features", ignore_errors=True)
                if slim:
                    _drop_optimizer_state(cell)
            return code
    except Locked:
        return LOCKED


def is_trained(cell: Cell) -> bool:
    """Whether the pretraining of a cell has finished; true for a cell that has none."""
    return cell.encoder is not None or has_finished(cell.directory)


def seconds_spent(cell: Cell) -> dict[str, float]:
    """Seconds by stage (``train``, ``evaluate``), over all starts; empty for a cell that was never run."""
    try:
        record = untrusted.read_record(cell.directory / COST)
    except (OSError, ValueError):
        return {}
    return {k: float(v) for k, v in record.items() if isinstance(v, int | float) and 0 <= v < _MAX_SECONDS}


def machines_used(cell: Cell) -> tuple[str, ...]:
    """Threads and kinds of device of all stages and starts, e.g. ``1 thread, CPU``; empty for a cell that was never
    run. Results depend on them in the last digits."""
    return tuple(dict.fromkeys(machine for used in _machines(cell).values() for machine in used))


def training_words(cell: Cell) -> list[str]:
    """The arguments of train.py."""
    return [f"--recipe={cell.directory / 'cell.yaml'}", f"--run-dir={cell.directory}"]


def evaluation_words(cell: Cell, evaluations: Sequence[Evaluation]) -> list[str]:
    """The arguments of evaluate.py for evaluations that differ in the mode only."""
    first = evaluations[0]
    words = [f"--recipe={first.folder / 'evaluation.yaml'}", f"--out={first.folder}"]
    words += [f"--mode={evaluation.mode}" for evaluation in evaluations]
    words += [f"--fraction={first.fraction:.12g}", f"--features={cell.directory / 'features'}"]
    if cell.encoder is None:
        exported = cell.directory / _MODEL
        words.append(f"--checkpoint={exported if exported.is_dir() else cell.directory}")
    else:  # scratch trains the recipe's network from its initial weights: those of the random one
        words.append(f"--baseline={'random' if cell.encoder == SCRATCH else cell.encoder}")
    if first.target is not None:
        words.append(f"--target={first.target}")
    if first.splits:
        words += ["--split", *(f"{role}={','.join(names)}" for role, names in first.splits.items())]
    return words


def pending_evaluations(cell: Cell) -> Iterator[list[Evaluation]]:
    """The evaluations without a result, by command: those on frozen features share one, so that they share the
    features; each training has a process of its own."""
    missing = [e for e in cell.evaluations if not e.is_finished]
    frozen = [e for e in missing if e.mode not in TRAINED_MODES]
    groups: dict[tuple[Path, float], list[Evaluation]] = {}
    for evaluation in frozen:
        groups.setdefault((evaluation.folder, evaluation.fraction), []).append(evaluation)
    yield from groups.values()
    yield from ([e] for e in missing if e.mode in TRAINED_MODES)


def write_inputs(cell: Cell) -> None:
    """Write the recipes that train.py and evaluate.py are given, and what the hash of the cell is of."""
    record = {"encoder": cell.encoder, "seed": cell.seed, "identity": cell.identity}
    files = {cell.directory / "cell.json": json.dumps(record, indent=1) + "\n"}
    if cell.encoder is None:
        files[cell.directory / "cell.yaml"] = cell.recipe.to_yaml()
    files |= {e.folder / "evaluation.yaml": e.recipe.to_yaml() for e in cell.evaluations}
    for path, text in files.items():
        if not path.exists() or path.read_text() != text:
            write_atomically(path, text)


def _run_stages(cell: Cell, stop: StopFlag, threads: int) -> int:
    write_inputs(cell)
    if not is_trained(cell):
        code = _stage(cell, "train", training_words(cell), stop, threads)
        if stop.is_set:
            return STOPPED
        if code or not is_trained(cell):
            return code or FAILED
    for group in list(pending_evaluations(cell)):
        code = _stage(cell, "evaluate", evaluation_words(cell, group), stop, threads)
        if stop.is_set:
            return STOPPED
        if code or not all(e.is_finished for e in group):
            return code or FAILED
    return 0


def _stage(cell: Cell, name: str, words: list[str], stop: StopFlag, threads: int) -> int:
    if stop.is_set:
        return STOPPED
    started, before = time.monotonic(), seconds_spent(cell)

    def write_cost() -> None:
        spent = {**before, name: round(before.get(name, 0.0) + time.monotonic() - started, 2)}
        with suppress(OSError):  # a full disk: the stage reports it
            write_atomically(cell.directory / COST, json.dumps(spent))

    def work() -> int:
        _record_machine(cell, name, threads)
        return run_entry(name, words, threads)

    # Also while it runs: a kill of this process must not lose the seconds.
    code = wait(fork(work, cell.directory / LOG), stop, write_cost)
    write_cost()
    return code


def _record_machine(cell: Cell, stage: str, threads: int) -> None:
    """Add a start of a stage to the record, in its process."""
    device = "CPU" if cell.recipe.train.device == "cpu" else device_kind()
    machine, used = f"{threads} thread{'s' * (threads != 1)}, {device}", _machines(cell)
    used[stage] = list(dict.fromkeys([*used.get(stage, []), machine]))
    with suppress(OSError):
        write_atomically(cell.directory / MACHINES, json.dumps(used))


def _machines(cell: Cell) -> dict[str, list[str]]:
    """Descriptions by stage; empty where the record is missing or damaged."""
    try:
        record = untrusted.read_record(cell.directory / MACHINES)
        return {str(stage): [str(machine) for machine in used] for stage, used in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _drop_optimizer_state(cell: Cell) -> None:
    for evaluation in cell.evaluations:  # of a finetuning; its best weights stay
        shutil.rmtree(evaluation.results.parent / "checkpoints", ignore_errors=True)
    if cell.encoder is not None:
        return
    from maestro_scale.interop.export import export_model

    checkpoints, model = cell.directory / "checkpoints", cell.directory / _MODEL
    removed = cell.directory / ".checkpoints.tmp"
    shutil.rmtree(removed, ignore_errors=True)
    if not checkpoints.is_dir():
        return
    fresh = cell.directory / f".{_MODEL}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    export_model(newest(cell.directory), fresh)
    shutil.rmtree(model, ignore_errors=True)
    fresh.rename(model)
    checkpoints.rename(removed)  # at once: a kill must not leave a folder that looks like damaged checkpoints
    shutil.rmtree(removed)
