"""The ``study`` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def study(
    file: Annotated[Path, typer.Argument(help="YAML file of the study (see recipes/study/).")],
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
        int | None, typer.Option(min=0, help="Run only the cell of this number of the dry run.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: write the result of the cells that are finished.")
    ] = False,
    slim: Annotated[
        bool, typer.Option("--slim", help="Keep only the weights of finished cells, no optimizer state.")
    ] = False,
) -> None:
    """Run an ablation study: a grid of recipes, seeds and evaluations, and what it says about each question.

    Finished cells are skipped and interrupted ones resume. Exit code 1 if a cell failed.
    """
    from rich.console import Console

    from maestro_scale.study.command import Request, StudyRun

    request = Request(file, scale, root, change or [], max(jobs, 1), threads, slim)
    run = StudyRun(request)
    if jobs == 0 and run.scale.gpu is None:
        run = StudyRun(Request(file, scale, root, change or [], os.cpu_count() or 1, threads, slim))
    if dry_run:
        run.dry_run(Console(width=None if Console().is_terminal else 140))
    elif print_commands:
        print("\n".join(run.commands()))
    elif slurm:
        print(run.submit(limit, sbatch or []))
    elif cell is not None:
        raise typer.Exit(run.run_cell(cell).exit_code)
    else:
        raise typer.Exit(run.finish(report))
