"""The metrics of results as data: titles, direction, and how values are written. A new metric is a new entry here."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricKind:
    """What distinguishes one metric from another. ``of_class``: title of the score of one class."""

    title: str
    of_class: str
    higher_is_better: bool = True
    is_fraction: bool = True
    """Fractions of 1 are shown as percent; other values have the units of the target."""

    @property
    def sign(self) -> int:
        """Scores times this are better where they are higher."""
        return 1 if self.higher_is_better else -1

    def number(self, value: float) -> str:
        """``78.8`` (percent) of a fraction, three significant digits of any other value."""
        return f"{100 * value:.1f}" if self.is_fraction else significant(value)

    def difference(self, value: float) -> str:
        """``+1.2``: a difference of two values, in percentage points or units."""
        return ("" if value < 0 else "+") + self.number(value)

    def unit(self, units: str) -> str:
        """``%``, or the units of the target."""
        return "%" if self.is_fraction else units


def significant(value: float) -> str:
    """Three significant digits, without an exponent from 0.001 to 99,999."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


METRIC_KINDS = {
    "wf1": MetricKind("wF1", "F1"),
    "miou": MetricKind("mIoU", "IoU"),
    "rmse": MetricKind("RMSE", "RMSE", higher_is_better=False, is_fraction=False),
}
"""By the name in results.json."""

MAX_SCORE = 1e50
"""Magnitude beyond which a score is taken for damage: its variance over seeds and tiles would overflow."""

UNBOUNDED_SCORES = ("r2", "mae", "bias")
"""Names of other scores that are not fractions of 1: R² is at most 1 and may be negative, the others have units."""
