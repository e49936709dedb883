"""The result of one section: measured values and checks, written to JSON after every change."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maestro_scale.training.run_dir import write_atomically

NOT_HERE = "not on this device"
"""Value of a measurement that needs another device, such as GPU memory on a CPU."""

PASSED, FAILED, ERROR, TIMEOUT, SKIPPED = "passed", "failed", "error", "timeout", "skipped"


@dataclass(frozen=True)
class Check:
    """A measured ``value`` and the largest one allowed. ``passed`` None: not measured, for the reason in ``note``."""

    name: str
    value: float | None
    limit: float | None
    passed: bool | None
    note: str = ""


@dataclass
class Record:
    """The record of a section. Saved at once, so that a crash, a hang or a timeout loses nothing that was measured.

    ``ends_at``: time.time() at which the section should be done.
    """

    path: Path
    ends_at: float
    data: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    skipped: str = ""

    @property
    def left_s(self) -> float:
        """Seconds of the section's time budget that remain."""
        return self.ends_at - time.time()

    def put(self, **values: Any) -> None:
        """Store measured values by name."""
        self.data.update(values)
        self.save()

    def check(self, name: str, value: float, limit: float, note: str = "") -> bool:
        """Store whether ``value`` is at most ``limit``; NaN is not."""
        passed = value <= limit
        self.checks.append(Check(name, value if math.isfinite(value) else None, limit, passed, note))
        self.save()
        return passed

    def expect(self, name: str, passed: bool, note: str = "") -> bool:
        """Store whether a condition holds."""
        self.checks.append(Check(name, None, None, passed, note))
        self.save()
        return passed

    def unavailable(self, name: str, reason: str = NOT_HERE) -> None:
        """Store that a check could not be made."""
        self.checks.append(Check(name, None, None, None, reason))
        self.save()

    def skip(self, reason: str) -> None:
        """Mark the whole section as not applicable."""
        self.skipped = reason
        self.save()

    @property
    def status(self) -> str:
        """``passed``, ``failed`` or ``skipped``, by the checks."""
        if self.skipped:
            return SKIPPED
        return FAILED if any(c.passed is False for c in self.checks) else PASSED

    def save(self) -> None:
        """Write the JSON."""
        content = {
            "status": self.status,
            "skipped": self.skipped,
            "checks": [asdict(c) for c in self.checks],
            "data": self.data,
        }
        write_atomically(self.path, json.dumps(content, indent=1))


def load_record(path: Path) -> dict[str, Any]:
    """The JSON of a section as far as it was written; empty if nothing was."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def relative(value: float, reference: float) -> float:
    """Relative difference of two numbers; NaN and infinities stay visible."""
    return abs(value - reference) / max(abs(reference), 1e-30)


def max_relative(curve: list[float], reference: list[float]) -> float:
    """Largest relative difference of two curves; infinite if they differ in length or a value is missing."""
    if len(curve) != len(reference) or not curve or None in curve or None in reference:
        return math.inf
    pairs = [relative(a, b) for a, b in zip(curve, reference, strict=True)]
    return math.inf if any(math.isnan(x) for x in pairs) else max(pairs)
