"""The figures of an invocation as tables, in docs/reliability.md between two markers."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tests.chaos.findings import KINDS, Outcome

BEGIN, END = "<!-- begin: written by python -m tests.chaos -->", "<!-- end -->"
_PACKAGES = ("torch", "deepspeed", "numpy", "s3fs", "mlflow", "moto")


@dataclass(frozen=True)
class Invocation:
    """How the figures came about."""

    command: str
    seed: int
    minutes: float
    reference_starts: int
    revision: str | None


def tables(invocation: Invocation, outcomes: Sequence[Outcome]) -> str:
    """Markdown: the invocation, findings by kind of round, injected faults by kind."""
    return "\n".join([*_about(invocation, outcomes), "", *_rounds(outcomes), "", *_faults(outcomes)])


def replace_between_markers(page: str, content: str) -> str:
    """A page with other content between its markers. ValueError if it does not have both."""
    if page.count(BEGIN) != 1 or END not in page.partition(BEGIN)[2]:
        raise ValueError(f"the page must contain {BEGIN} and {END}, once each")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.partition(END)[2]}"


def write_page(path: Path, invocation: Invocation, outcomes: Sequence[Outcome]) -> None:
    """Write the figures into the page."""
    path.write_text(replace_between_markers(path.read_text(), tables(invocation, outcomes)))


def _about(invocation: Invocation, outcomes: Sequence[Outcome]) -> list[str]:
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    starts = sum(o.starts for o in outcomes)
    num_faults = sum(n for o in outcomes for name, n in o.injected.items() if not _is_request(name))
    return [
        f"Command: `{invocation.command}` (seed {invocation.seed}), {invocation.minutes:.1f} minutes, revision "
        f"{invocation.revision or 'unknown'}.",
        f"Machine: {os.cpu_count()} CPU cores, {_memory_gib():.0f} GiB of memory, no GPU used, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, {versions}.",
        f"{len(outcomes)} rounds, {starts} starts of disturbed runs and {invocation.reference_starts} of undisturbed "
        f"ones, {num_faults} injected faults.",
    ]


def _rounds(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [f"| round | rounds | starts | {' | '.join(KINDS)} | not run |", "|---" * (len(KINDS) + 4) + "|"]
    for kind in sorted({o.kind for o in outcomes}):
        lines.append(_row(kind, [o for o in outcomes if o.kind == kind]))
    return [*lines, _row("all", outcomes)]


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    run = [o for o in outcomes if not o.not_run]
    reasons = Counter(o.not_run for o in outcomes if o.not_run)
    numbers = [len(run), sum(o.starts for o in run), *(sum(o.count(kind) for o in run) for kind in KINDS)]
    missing = "; ".join(f"{n}: {reason}" for reason, n in reasons.items()) or "0"
    return f"| {name} | {' | '.join(map(str, numbers))} | {missing} |"


def _faults(outcomes: Sequence[Outcome]) -> list[str]:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total += outcome.injected
    lines = ["| injected | number | in rounds |", "|---|---|---|"]
    for name, number in sorted(total.items()):
        kinds = ", ".join(sorted({o.kind for o in outcomes if o.injected[name]}))
        lines.append(f"| {name} | {number} | {kinds} |")
    return lines


def _is_request(name: str) -> bool:
    return name.startswith("S3 requests")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
