"""When a run started, made its steps and ended, read from its directory; in milliseconds since 1970, as in MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_scale.training.run_dir import write_atomically
from maestro_scale.training.setup import first_start

ENDED_FILE = (
    "ended"  # in the run directory: how the run ended, a key of STATUS, and when (seconds since 1970)
)
STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LAST_S = 2.0**40  # a later time is not one


@dataclass(frozen=True)
class RunEnd:
    """How a run ended, a key of ``STATUS``, and when."""

    reason: str
    time_ms: int


def line_times_ms(lines: Iterable[Mapping[str, Any]], file: Path) -> list[int]:
    """The time of each line of metrics.jsonl.

    Lines of earlier revisions have none: they are placed before the next line that has one, or before the last change
    of ``file``, by the seconds per step that they state.
    """
    times: list[int] = []
    try:
        later, step = file.stat().st_mtime, None
    except OSError:  # it was removed
        later, step = 0.0, None
    step_s = 0.0
    for line in reversed(list(lines)):
        time = line.get("time")
        if _is_time(time):
            later = time
        elif step is not None:
            later = max(0.0, later - step_s * max(0, step - line["step"]))
        step = line["step"]
        step_s = line["step_s"] if _is_time(line.get("step_s")) else 0.0
        times.append(round(1000 * later))
    return times[::-1]


def start_ms(run_dir: Path, lines: Iterable[Mapping[str, Any]]) -> int | None:
    """When the run was first started; of a run of an earlier revision, when its first logged step began. None if it
    has logged nothing."""
    if (started := first_start(run_dir)) is not None:
        return round(1000 * started)
    lines = list(lines)
    if not lines:
        return None
    first = lines[0]
    seconds = first["step_s"] * first["step"] if _is_time(first.get("step_s")) else 0.0
    return max(0, line_times_ms(lines, run_dir / "metrics.jsonl")[0] - round(1000 * min(seconds, _LAST_S)))


def write_end(run_dir: Path, end: RunEnd) -> None:
    """Record how and when the run ended. Raises OSError."""
    write_atomically(run_dir / ENDED_FILE, f"{end.reason} {end.time_ms / 1000:.3f}")


def read_end(run_dir: Path, lines: Iterable[Mapping[str, Any]]) -> RunEnd:
    """How the run ended. One that was killed left no record: ``stopped``, with its last line."""
    file = run_dir / ENDED_FILE
    words = file.read_text().split() if file.exists() else []
    reason = words[0] if words and words[0] in STATUS else "stopped"
    try:
        time = float(words[1])
    except (IndexError, ValueError):
        time = float("nan")
    if _is_time(time):
        return RunEnd(reason, round(1000 * time))
    last = line_times_ms(lines, run_dir / "metrics.jsonl")[-1:]
    return RunEnd(reason, last[0] if last else round(1000 * run_dir.stat().st_mtime))


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LAST_S
