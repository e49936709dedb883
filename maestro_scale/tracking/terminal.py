"""Progress on standard error: a bar on a terminal, plain lines in a log or under SLURM."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from maestro_scale.training.observer import RunInfo, SensorView
from maestro_scale.training.setup import read_environment, setup_line

_LINE_INTERVAL_S = 10.0


class TerminalProgress:
    """Shows the progress of a training run: loss, samples/s and remaining time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._info: RunInfo | None = None
        self._last_s = 0.0

    def started(self, info: RunInfo) -> None:
        """Show the first and last step of this start, and begin the bar."""
        self._info = info
        start = f"from step {info.step} " if info.step else ""
        lines = [
            f"{self._name}: {start}to step {info.num_steps}, in {info.run_dir}",
            setup_line(read_environment(info.run_dir)),
        ]
        print("\n".join(filter(None, lines)), file=sys.stderr, flush=True)
        if _supports_bar(self._console) and info.step < info.num_steps:
            self._bar = _bar(self._console, TextColumn("{task.fields[state]}"))
            self._bar.start()
            self._bar.add_task(self._name, total=info.num_steps, completed=info.step, state="")

    def logged(self, record: dict[str, Any]) -> None:
        """Show a logged step."""
        assert self._info is not None  # started() is called before logged()
        loss = "skipped" if record["loss"] is None else f"loss {record['loss']:.4f}"
        state = f"{loss}  {record['samples_per_s']:.1f} samples/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record["step"], state=state)
            return
        # Lines are limited in time, not in steps: a log of a day-long run stays readable whatever the speed.
        last = record["step"] == self._info.num_steps
        if last or time.monotonic() - self._last_s >= _LINE_INTERVAL_S:
            self._last_s = time.monotonic()
            left_s = (self._info.num_steps - record["step"]) * record["step_s"]
            where = f"step {record['step']}/{self._info.num_steps}"
            print(f"{where}  {state}  {_format_duration(left_s)} left", file=sys.stderr, flush=True)

    def pictured(self, step: int, views: list[SensorView]) -> None:
        """Pictures are not shown on a terminal."""

    def finished(self, reason: str) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(title: str, unit: str, rank: int = 0) -> Iterator[Callable[[int, int, int], None]]:
    """Shows the progress of a long command; yields ``update(done, total, num_bytes)``. Only rank 0 prints."""
    if rank:
        yield lambda done, total, num_bytes: None
        return
    console = Console(stderr=True)  # standard output is for results
    if _supports_bar(console):
        with _bar(console, TextColumn("{task.fields[state]}")) as bar:
            task = bar.add_task(title, total=None, state="")

            def update(done: int, total: int, num_bytes: int) -> None:
                bar.update(task, completed=done, total=total, state=f"{unit}{_format_size(num_bytes)}")

            yield update
        return
    started, last = time.monotonic(), [time.monotonic()]

    def print_line(done: int, total: int, num_bytes: int) -> None:
        now = time.monotonic()
        if done < total and now - last[0] < _LINE_INTERVAL_S:
            return
        last[0] = now
        rate = done / max(now - started, 1e-9)
        left = _format_duration((total - done) / rate) if rate else "unknown time"
        print(
            f"{title}: {done}/{total} {unit}{_format_size(num_bytes)}, {rate:.3g}/s, {left} left",
            file=sys.stderr,
            flush=True,
        )

    yield print_line


def _supports_bar(console: Console) -> bool:
    """Whether a bar can be drawn. Under srun it cannot: the terminal shows the output of all processes mixed."""
    return console.is_terminal and "SLURM_JOB_ID" not in os.environ


def _bar(console: Console, last: TextColumn) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), last, console=console)


def _format_size(num_bytes: int) -> str:
    return f", {num_bytes / 1e6:.0f} MB" if num_bytes else ""


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
