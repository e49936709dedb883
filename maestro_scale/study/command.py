"""The ``study`` command: which cells are run, how, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from maestro_scale.escaping import console_text, shell_command
from maestro_scale.study import data as study_data
from maestro_scale.study.cells import Cell, distinct, expand, scale_of
from maestro_scale.study.config import Scale, Study, load_study
from maestro_scale.study.records import CellRecord, EvaluationRecord
from maestro_scale.study.run import Outcome, RunOptions, StudyError, check_data, run_cells
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
        slim = ["--slim"] * self.slim
        return [
            str(self.file.resolve()),
            "--scale",
            scale,
            "--root",
            str(self.root.resolve()),
            *changes,
            *slim,
        ]


class StudyRun:
    """A loaded study at one scale, with its cells."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.study: Study = load_study(request.file, request.overrides)
        self.scale_name = request.scale or _only_scale(self.study)
        self.scale: Scale = scale_of(self.study, self.scale_name)
        self.root = request.root.resolve()
        self.options = RunOptions(
            f"{self.study.name}-{self.scale_name}", self.root, request.jobs, request.threads, request.slim
        )
        self.cells: list[Cell] = expand(self.study, self.scale_name, self.root)
        if self.study.sample is not None:
            self.cells += self._sampled()
        self.distinct: list[Cell] = distinct(self.cells)

    def run(self) -> Outcome:
        """Run the missing cells on this machine."""
        check_data(self.distinct)
        run = partial(run_cells, scale=self.scale, options=self.options)
        if self.study.sample is None:
            return run(self.distinct)
        from maestro_scale.study.sampler import search

        outcome = search(self.study, self.scale_name, self.root, self.options.study_dir, run)
        self.cells = [*expand(self.study, self.scale_name, self.root), *self._sampled()]
        self.distinct = distinct(self.cells)
        return outcome

    def finish(self, report_only: bool = False) -> int:
        """Run the missing cells unless ``report_only``, then write the result; returns the exit code."""
        outcome = Outcome() if report_only else self.run()
        if not outcome.is_stopped:
            self.write_result()
        return outcome.exit_code

    def run_cell(self, number: int) -> Outcome:
        """Run one cell by its number in the dry run."""
        if not 0 <= number < len(self.distinct):
            raise StudyError(f"--cell {number}: the study has the cells 0 to {len(self.distinct) - 1}")
        check_data(self.distinct)
        return run_cells([self.distinct[number]], self.scale, self.options)

    def missing(self) -> list[int]:
        """The numbers of the cells that are not finished."""
        if self.study.sample is not None:
            raise StudyError(
                "a study with `sample` chooses its cells one after the other: run it on one machine"
            )
        return [number for number, cell in enumerate(self.distinct) if not cell.is_finished]

    def commands(self) -> list[str]:
        """A shell command per missing cell."""
        words = self.request.words(self.scale_name)
        return [shell_command("maestro-scale", "study", *words, "--cell", n) for n in self.missing()]

    def submit(self, limit: int, options: Sequence[str]) -> str:
        """Submit the missing cells to SLURM; returns a line that says what was submitted."""
        from maestro_scale.study.slurm import submit

        numbers = self.missing()
        check_data(self.distinct)
        if not numbers:
            return f"{self.options.study}: all {len(self.distinct)} cells are finished"
        for (
            cell
        ) in self.distinct:  # here, because tasks on several nodes would wait for the one that writes it
            for data in (cell.data, *(e.data for e in cell.evaluations)):
                study_data.write(data, self.root)
        array, report = submit(numbers, self.request.words(self.scale_name), self.root, limit, options)
        return f"array {array} of {len(numbers)} cells, then job {report} for the result in {self.options.study_dir}"

    def dry_run(self, console: Console) -> None:
        """Print every cell with its cost, and the total."""
        from maestro_scale.study.cost import cell_costs, measured_rate

        costs = cell_costs(self.distinct, self.scale.gpu)
        rate = measured_rate(zip(self.distinct, costs, strict=True))
        table = Table(title=f"{self.options.study}: {len(self.distinct)} cells", title_justify="left")
        unit = "GPU h" if self.scale.gpu else "s"
        for column in ("#", "cell", "steps", "samples", unit, "state"):
            table.add_column(column, justify="left" if column in ("cell", "state") else "right")
        total = missing = 0.0
        for number, (cell, cost) in enumerate(zip(self.distinct, costs, strict=True)):
            spent = cost.gpu_hours if self.scale.gpu else cost.seconds(rate)
            done = cell.is_finished
            total, missing = total + (spent or 0.0), missing + (0.0 if done else spent or 0.0)
            shown = "?" if spent is None else f"{spent:.2f}" if self.scale.gpu else f"{spent:.0f}"
            numbers = ["-" if n is None else f"{n:,}" for n in (cost.steps, cost.samples)]
            state = "finished" if done else "started" if (cell.directory / "cell.json").exists() else ""
            table.add_row(str(number), console_text(cell.label), *numbers, shown, state)
        console.print(table)
        finished = sum(cell.is_finished for cell in self.distinct)
        if self.scale.gpu:
            text = f"{total:.1f} GPU hours ({self.scale.gpu.kind}, MFU {self.scale.gpu.mfu:g}), {missing:.1f} missing"
        else:
            jobs = self.options.jobs
            text = (
                f"{total / 3600:.1f} core hours, {missing / jobs / 3600:.1f} hours missing with --jobs {jobs}"
            )
        console.print(f"{len(self.distinct)} cells, {finished} finished: {text}")

    def _sampled(self) -> list[Cell]:
        from maestro_scale.study.sampler import known_trials, trial_cells

        trials = known_trials(self.study, self.scale_name, self.root, self.options.study_dir)
        return [c for p in trials for c in trial_cells(self.study, self.scale_name, self.root, p)]

    def records(self) -> list[CellRecord]:
        """The cells for the analysis: those of the grid, also where several share a directory."""
        gpus = 0 if self.scale.gpu is None else 1
        return [_record(cell, gpus) for cell in self.cells]

    def write_result(self) -> None:
        """Write the pages of the study, and which cells it consists of, from the results that are there."""
        from maestro_scale.study.analysis import analyse
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
