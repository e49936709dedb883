"""The final report of a run, ``report.md`` in its directory: losses, speed, skipped steps, next commands."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maestro_scale.escaping import markdown_text, shell_command
from maestro_scale.recipe import Recipe
from maestro_scale.tracking.run_times import ENDED_FILE
from maestro_scale.training.run_dir import JsonLines
from maestro_scale.training.setup import read_environment, setup_line

REPORT = "report.md"


def run_report(recipe: Recipe, run_dir: Path, reason: str) -> str:
    """Markdown from ``metrics.jsonl`` and ``environment.json``: setup, first and last losses of each dataset, speed,
    skipped steps, next commands.

    ``reason``: ``done``, ``stopped`` or ``failed``.
    """
    lines = list(JsonLines(run_dir / "metrics.jsonl").read())
    if not lines:
        return f"# {markdown_text(recipe.name)}: {reason} before the first log line\n"
    last = lines[-1]
    name = " ".join(filter(None, (recipe.name, _mode(run_dir))))
    parts = [
        f"# {markdown_text(name)}: {reason} after {last['step']:,} steps",
        f"{_subject(recipe)}, {last['samples']:,} samples, {last['skipped_steps']} steps skipped.",
        *filter(None, [markdown_text(setup_line(read_environment(run_dir)))]),
        *(_loss_table(name, of_dataset) for name, of_dataset in _by_dataset(recipe, lines).items()),
        _speed_table(lines),
        "## Next",
        "\n".join(f"    {command}" for command in next_commands(run_dir, reason)),
    ]
    return "\n\n".join(parts) + "\n"


def report_head(recipe: Recipe, run_dir: Path) -> str:
    """The report of a run that has ended, up to its first table; of another run what is known of it. Markdown."""
    try:
        # A run that was resumed has the report of its last start.
        report = (run_dir / REPORT).read_text() if (run_dir / ENDED_FILE).exists() else ""
    except (OSError, ValueError):
        report = ""
    if not report:
        setup = markdown_text(setup_line(read_environment(run_dir)))
        return "\n\n".join(filter(None, [f"{_subject(recipe)}.", setup]))
    parts = itertools.takewhile(lambda part: not part.startswith(("|", "## ")), report.split("\n\n"))
    return "\n\n".join(parts).strip()


def next_commands(run_dir: Path, reason: str) -> tuple[str, ...]:
    """Commands to run next, after a run that ended for ``reason``."""
    if _mode(run_dir):
        report = shell_command("maestro-scale", "report", run_dir, "--out", "report.html")
        return (report,) if reason == "done" else ()
    options = (*_ranks(run_dir), "--recipe", run_dir / "recipe.yaml")
    if reason != "done":
        return (shell_command("maestro-scale", "train", *options, "--run-dir", run_dir),)
    return (
        shell_command("maestro-scale", "export", run_dir, "MODEL"),
        shell_command("maestro-scale", "evaluate", *options, "--checkpoint", run_dir, "--out", "RESULTS"),
        shell_command("maestro-scale", "dashboard", run_dir.parent),
    )


def closing_message(run_dir: Path, reason: str) -> str:
    """What the terminal shows after a run: where its report is, and the next commands. Empty for a stopped run."""
    if reason != "done":
        return ""
    commands = "\n".join(f"    {command}" for command in next_commands(run_dir, reason))
    return f"losses and speed are in {run_dir / REPORT}; next:\n{commands}"


def _ranks(run_dir: Path) -> tuple[str, ...]:
    """The option for as many ranks as the run had; none where they were on several nodes."""
    setup = read_environment(run_dir).get("setup")
    return ("--nproc", str(setup["ranks"])) if setup and setup["nodes"] == 1 < setup["ranks"] else ()


def _subject(recipe: Recipe) -> str:
    datasets = " and ".join(dict.fromkeys(e.dataset for e in recipe.data.mixture))
    return f"MAESTRO {recipe.model.size} on {markdown_text(datasets)}"


def _mode(run_dir: Path) -> str | None:
    """``finetune`` or ``scratch`` of the run in a directory; None for a pretraining."""
    return read_environment(run_dir).get("mode")


def _by_dataset(recipe: Recipe, lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    # Finetunings of earlier revisions logged neither the dataset, of which there is one, nor the speed.
    default = recipe.data.mixture[0].dataset
    for line in lines:
        grouped.setdefault(line.get("dataset", default), []).append(line)
    return grouped


def _loss_table(dataset: str, lines: Sequence[dict[str, Any]]) -> str:
    first, last = lines[0], lines[-1]
    names = ["loss", *(k for k in last if k.startswith(("loss/", "explained/")))]
    rows = [
        f"| {markdown_text(name.removeprefix('loss/'))} | {_number(first.get(name))} | {_number(last.get(name))} |"
        for name in names
    ]
    head = f"| {markdown_text(dataset)} | step {first['step']:,} | step {last['step']:,} |\n|---|---:|---:|"
    return "\n".join([head, *rows])


def _speed_table(lines: Sequence[dict[str, Any]]) -> str:
    rows = {
        "samples/s": _median(lines, "samples_per_s"),
        "visible tokens/s": _median(lines, "tokens_per_s"),
        "seconds per step": _median(lines, "step_s"),
        "of these, waiting for data": _median(lines, "data_wait_s"),
        "TFLOP/s per rank": _median(lines, "tflops"),
        "MFU": _median(lines, "mfu"),
        "peak memory, GiB": max(
            (x["peak_memory_gib"] for x in lines if x.get("peak_memory_gib") is not None), default=None
        ),
    }
    cells = [f"| {name} | {_number(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| median over log lines | |", "|---|---:|", *cells])


def _median(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return statistics.median(values) if values else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.4g}"
