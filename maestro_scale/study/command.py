"""The ``study`` command: which cells are run, how, and what is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from maestro_scale import untrusted
from maestro_scale.entry import is_disk_full
from maestro_scale.errors import shorten
from maestro_scale.escaping import console_text, shell_command
from maestro_scale.recipe import RecipeError
from maestro_scale.study import data as study_data
from maestro_scale.study.analysis import analyse, unanswered
from maestro_scale.study.cells import Cell, distinct, expand, scale_of
from maestro_scale.study.checks import check_study
from maestro_scale.study.config import Scale, Study, load_study
from maestro_scale.study.processes import STOPPED
from maestro_scale.study.records import CellRecord, EvaluationRecord
from maestro_scale.study.run import Outcome, RunOptions, StudyError, check_data, run_cells
from maestro_scale.study.tracking import end_study
from maestro_scale.study.worker import machines_used, seconds_spent
from maestro_scale.training.run_dir import write_atomically


@dataclass(frozen=True)
class Request:
    """One call of the command. ``scale`` empty: the only one of the file."""

    file: Path
    scale: str
    root: Path
    overrides: Sequence[str] = ()
    jobs: int = 1
    threads: int = 0
    slim: bool = False

    def words(self, scale: str) -> list[str]:
        """The arguments that name the study, for another process on any machine that sees the same disks."""
        changes = [word for change in self.overrides for word in ("--set", change)]
        threads = ["--threads", str(self.threads)] if self.threads else []
        slim = ["--slim"] * self.slim
        return [
            str(self.file.resolve()),
            "--scale",
            scale,
            "--root",
            str(self.root.resolve()),
            *changes,
            *threads,
            *slim,
        ]


class StudyRun:
    """A loaded study at one scale, with its cells."""

    def __init__(self, request: Request) -> None:
        self.request = request
        study = load_study(request.file, request.overrides)
        self.scale_name = request.scale or _only_scale(study)
        self.scale: Scale = scale_of(study, self.scale_name)
        asked = [q.model_copy(update={"mode": q.mode or self.scale.mode}) for q in study.questions]
        self.study: Study = study.model_copy(update={"questions": tuple(asked)})
        self.root = request.root.resolve()
        self.options = RunOptions(
            f"{self.study.name}-{self.scale_name}", self.root, request.jobs, request.threads, request.slim
        )
        self.cells: list[Cell] = expand(self.study, self.scale_name, self.root)
        if self.study.sample is not None:
            self.cells += self._sampled()
        self.distinct: list[Cell] = distinct(self.cells)
        if not self.cells and self.study.sample is None:
            raise StudyError(f"{self.options.study}: no cell is left: exclude fewer, or keep a dataset")

    def check(self) -> None:
        """RecipeError or StudyError where running the cells would be in vain; says which questions have no answer."""
        check_data(self.distinct)
        check_study(self.study, self.distinct)
        for question, dataset in unanswered(self.study, self.records()):
            print(
                f"warning: {self.options.study}: question {question} has no answer on {dataset}: no cell or evaluation "
                "has its levels, mode, fraction and benchmark",
                file=sys.stderr,
            )

    def run(self) -> Outcome:
        """Run the missing cells on this machine."""
        self.check()
        run = partial(run_cells, scale=self.scale, options=self.options)
        if self.study.sample is None:
            return run(self.distinct)
        from maestro_scale.study.sampler import search

        baselines = distinct(expand(self.study, self.scale_name, self.root))
        first = run(baselines, is_whole=False) if baselines else Outcome()
        if first.is_stopped:
            return first
        outcome = search(self.study, self.scale_name, self.root, self.options.study_dir, run)
        self.cells = [*expand(self.study, self.scale_name, self.root), *self._sampled()]
        self.distinct = distinct(self.cells)
        return replace(
            outcome,
            finished=first.finished + outcome.finished,
            failures=[*first.failures, *outcome.failures],
        )

    def finish(self, report_only: bool = False) -> int:
        """Run the missing cells unless ``report_only``, then write the result; returns the exit code."""
        outcome = Outcome() if report_only else self.run()
        if report_only:
            self._end_if_complete()
        if not outcome.is_stopped:
            try:
                self.write_result()
            except OSError as error:
                # The disk that is full is the one of the failures, which are printed already.
                if not outcome.failures or not is_disk_full(error):
                    raise
        return outcome.exit_code

    def run_cell(self, wanted: str, names: Path | None = None) -> Outcome:
        """Run one cell, by its name or its number in the dry run; with ``names`` by its line, from 0, in this file."""
        cell = self._find(_line(names, wanted) if names is not None else wanted)
        check_data(self.distinct)
        check_study(self.study, [cell])
        outcome = run_cells([cell], self.scale, self.options, is_whole=False)
        self._end_if_complete()
        return outcome

    def _find(self, wanted: str) -> Cell:
        if wanted.isdecimal():
            if int(wanted) < len(self.distinct):
                return self.distinct[int(wanted)]
            raise StudyError(f"--cell {wanted}: the study has the cells 0 to {len(self.distinct) - 1}")
        for cell in self.distinct:
            if cell.name == wanted:
                return cell
        raise StudyError(
            f"--cell {shorten(wanted, 200)}: {self.options.study} has no cell of this name: its file, a recipe, "
            "data or weights were changed since it was listed; list the cells again (--print, --slurm)"
        )

    def _end_if_complete(self) -> None:
        """Set the study's run in MLflow to FINISHED when its last cell is: cells of an array end one by one."""
        if all(cell.is_finished for cell in self.distinct):
            end_study(self.distinct, self.options.study_dir, True)

    def missing(self) -> list[str]:
        """The names of the cells that are not finished."""
        if self.study.sample is not None:
            raise StudyError(
                "a study with `sample` chooses its cells one after the other: run it on one machine"
            )
        return [cell.name for cell in self.distinct if not cell.is_finished]

    def commands(self) -> list[str]:
        """A shell command per missing cell."""
        words = self.request.words(self.scale_name)
        return [shell_command("maestro-scale", "study", *words, "--cell", name) for name in self.missing()]

    def submit(self, limit: int, options: Sequence[str]) -> str:
        """Submit the missing cells to SLURM; returns a line that says what was submitted."""
        from maestro_scale.study.slurm import submit

        names = self.missing()
        self.check()
        if not names:
            return f"{self.options.study}: all {len(self.distinct)} cells are finished"
        for (
            cell
        ) in self.distinct:  # here, because tasks on several nodes would wait for the one that writes it
            for data in (cell.data, *(e.data for e in cell.evaluations)):
                study_data.write(data, self.root)
        array, report = submit(names, self.request.words(self.scale_name), self.root, limit, options)
        return f"array {array} of {len(names)} cells, then job {report} for the result in {self.options.study_dir}"

    def _sampled(self) -> list[Cell]:
        from maestro_scale.study.sampler import known_trials, trial_cells

        cells = []
        for values in known_trials(self.study, self.scale_name, self.root, self.options.study_dir):
            with suppress(RecipeError):  # of a trial that a kill interrupted before it was recorded as failed
                cells += trial_cells(self.study, self.scale_name, self.root, values)
        return cells

    def records(self) -> list[CellRecord]:
        """The cells for the analysis: those of the grid, also where several share a directory."""
        gpus = 0 if self.scale.gpu is None else 1
        return [_record(cell, gpus) for cell in self.cells]

    def write_result(self) -> None:
        """Write the pages of the study, and which cells it consists of, from the results that are there."""
        from maestro_scale.study.page import write_pages

        record = {
            "file": str(self.request.file.resolve()),
            "scale": self.scale_name,
            "overrides": list(self.request.overrides),
            "study": self.study.model_dump(mode="json"),
            "cells": [{"label": cell.label, "name": cell.name} for cell in self.cells],
        }
        write_atomically(self.options.study_dir / "cells.json", json.dumps(record, indent=1) + "\n")
        command = shell_command("maestro-scale", "study", *self.request.words(self.scale_name))
        pages = write_pages(analyse(self.study, self.records()), self.options.study_dir, command)
        print(f"result: {', '.join(map(str, pages))}")


def run_all(runs: Sequence[StudyRun], report_only: bool) -> int:
    """Run studies one after the other, of which the later ones find the shared cells finished. Returns the exit code:
    after a signal STOPPED, else the largest."""
    codes = [0]
    for run in runs:
        codes.append(run.finish(report_only))
        if codes[-1] == STOPPED:
            return STOPPED
    return max(codes)


def plan(runs: Sequence[StudyRun], console: Console) -> None:
    """Print every cell of one or several studies with its cost, and the total; a cell that they share once."""
    from maestro_scale.study.cost import cell_costs, measured_rate

    for run in runs:
        run.check()
    cells = distinct([cell for run in runs for cell in run.distinct])
    gpus = {None if run.scale.gpu is None else run.scale.gpu.model_dump_json() for run in runs}
    if len(gpus) > 1:
        raise StudyError("--dry-run: the studies are planned for different GPUs: list them one by one")
    gpu = runs[0].scale.gpu
    costs = cell_costs(cells, gpu)
    rate = measured_rate(zip(cells, costs, strict=True))
    title = ", ".join(run.options.study for run in runs)
    table = Table(title=f"{title}: {len(cells)} cells", title_justify="left")
    for column in ("#", "cell", "steps", "samples", "GPU h" if gpu else "s", "state"):
        table.add_column(column, justify="left" if column in ("cell", "state") else "right")
    total = missing = 0.0
    finished = [cell.is_finished for cell in cells]
    for number, (cell, cost) in enumerate(zip(cells, costs, strict=True)):
        spent = cost.gpu_hours if gpu else cost.seconds(rate)
        total, missing = total + (spent or 0.0), missing + (0.0 if finished[number] else spent or 0.0)
        shown = "?" if spent is None else f"{spent:.2f}" if gpu else f"{spent:.0f}"
        numbers = ["-" if n is None else f"{n:,}" for n in (cost.steps, cost.samples)]
        is_started = (cell.directory / "cell.json").exists()
        state = "finished" if finished[number] else "started" if is_started else ""
        table.add_row(str(number), console_text(cell.label), *numbers, shown, state)
    console.print(table)
    if gpu:
        text = f"{total:.1f} GPU hours ({gpu.kind}, MFU {gpu.mfu:g}), {missing:.1f} missing"
    else:
        jobs = runs[0].options.jobs
        text = f"{total / 3600:.1f} core hours, {missing / jobs / 3600:.1f} hours missing with --jobs {jobs}"
    console.print(f"{len(cells)} cells, {sum(finished)} finished: {text}")


def _line(file: Path, number: str) -> str:
    try:
        lines = untrusted.read_bytes(file, untrusted.RECIPE).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"--cells {file}: cannot be read ({error}): submit the study again") from None
    if not number.isdecimal() or int(number) >= len(lines):
        raise StudyError(f"--cell {shorten(number)}: {file} has the lines 0 to {len(lines) - 1}")
    return lines[int(number)]


def _record(cell: Cell, gpus: int) -> CellRecord:
    evaluations = [EvaluationRecord(e.benchmark, e.mode, e.results, e.fraction) for e in cell.evaluations]
    return CellRecord(
        cell.name,
        cell.dataset,
        cell.seed,
        dict(cell.levels),
        "" if cell.levels or cell.encoder is None else cell.encoder,
        evaluations,
        sum(seconds_spent(cell).values()) or None,
        gpus,
        machines_used(cell),
    )


def _only_scale(study: Study) -> str:
    if len(study.scales) > 1:
        raise StudyError(
            f"{study.name} has several scales: choose one of {', '.join(study.scales)} with --scale"
        )
    return next(iter(study.scales))
