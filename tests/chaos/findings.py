"""Findings of a round, and counts of injected faults and findings by kind."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

LOST = "samples lost"
REPEATED = "samples repeated"
WRONG = "wrong results"
HANG = "hangs"
UNCLEAR = "unclear terminations"
LEFT = "left behind"
KINDS = (LOST, REPEATED, WRONG, HANG, UNCLEAR, LEFT)


@dataclass(frozen=True)
class Finding:
    """A difference from the undisturbed run: ``kind`` is one of ``KINDS``, ``count`` e.g. the number of samples."""

    kind: str
    text: str
    count: int = 1


@dataclass
class Outcome:
    """What happened in one round: faults injected by name, starts, findings; ``not_run``: why it could not run."""

    kind: str
    number: int
    injected: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    findings: list[Finding] = field(default_factory=list)
    not_run: str = ""
    seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def inject(self, fault: str, count: int = 1) -> None:
        """Count a fault that took effect; may be called from threads."""
        with self._lock:
            self.injected[fault] += count

    def count(self, kind: str) -> int:
        """Total of the findings of a kind."""
        return sum(f.count for f in self.findings if f.kind == kind)


class NotRun(Exception):
    """A round that this machine does not allow, e.g. without root; the message is the reason."""
