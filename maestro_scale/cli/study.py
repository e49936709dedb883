"""The ``study`` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def study(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="STUDY",
            help="YAML file of the study, or the name of one that comes with the package, e.g. targets; "
            "several: run in turn.",
        ),
    ],
    scale: Annotated[str, typer.Option(help="Scale of the file, e.g. cpu or gpu.")] = "",
    root: Annotated[
        Path, typer.Option(help="Folder of all studies: data, cells and results. Cells in it are shared.")
    ] = Path("studies"),
    jobs: Annotated[
        int,
        typer.Option(
            min=0, help="Cells at a time; 0: one per core, on GPUs one. A cell uses at most one GPU."
        ),
    ] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of a cell; 0: the cores divided by JOBS.")] = 0,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value of the study. Can be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells with their cost, and exit.")
    ] = False,
    print_commands: Annotated[
        bool, typer.Option("--print", help="Print a shell command per missing cell, and exit.")
    ] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit the cells as a SLURM array, and exit.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="With --slurm: tasks at a time; 0: no limit.")] = 0,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="With --slurm: an option of sbatch. Can be repeated.")
    ] = None,
    cell: Annotated[
        str, typer.Option(help="Run only this cell, by the name of its folder, or its number in the dry run.")
    ] = "",
    cells: Annotated[
        Path | None,
        typer.Option(
            help="With --cell N: N is the number of a line, from 0, in this file of names (--slurm)."
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: write the result of the cells that are finished.")
    ] = False,
    slim: Annotated[
        bool, typer.Option("--slim", help="Keep only the weights of finished cells, no optimizer state.")
    ] = False,
) -> None:
    """Run an ablation study: a grid of recipes, seeds and evaluations, and what it says about each question.

    Finished cells are skipped and interrupted ones resume. Several studies share cells. Exit code 1 if a cell failed.
    """
    from rich.console import Console

    from maestro_scale.strict_yaml.merge import locate
    from maestro_scale.study.command import Request, StudyRun, plan, run_all
    from maestro_scale.study.run import StudyError

    if len(files) > 1 and cell:
        raise StudyError("--cell: give one study")
    if cells is not None and not cell:
        raise StudyError("--cells: give --cell with the number of a line in this file")
    choices = {
        "--dry-run": dry_run,
        "--print": print_commands,
        "--slurm": slurm,
        "--cell": cell,
        "--report": report,
    }
    if len(given := [name for name, value in choices.items() if value]) > 1:
        raise StudyError(f"{' and '.join(given)}: give one of them")

    def load(file: Path) -> StudyRun:
        run = StudyRun(Request(file, scale, root, change or [], max(jobs, 1), threads, slim))
        if jobs or run.scale.gpu is not None:
            return run
        return StudyRun(Request(file, scale, root, change or [], os.cpu_count() or 1, threads, slim))

    runs = [load(locate(file, "study")) for file in files]
    names = [run.options.study for run in runs]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), ""):
        raise StudyError(
            f"{twice}: two of the studies have this name, and would have the same results: rename one"
        )
    if dry_run:
        plan(runs, Console(width=None if Console().is_terminal else 140))
    elif print_commands:
        print("\n".join(line for run in runs for line in run.commands()))
    elif slurm:
        for run in runs:
            print(run.submit(limit, sbatch or []), flush=True)
    elif cell:
        raise typer.Exit(runs[0].run_cell(cell, cells).exit_code)
    else:
        raise typer.Exit(run_all(runs, report))
