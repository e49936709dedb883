"""``metrics.jsonl`` of a run that may be killed at any moment: a line per logged step, written once."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from maestro_scale.training.run_dir import JsonLines

log = logging.getLogger(__name__)

_ROUNDING = 1e-3  # relative: other ranks, another ZeRO stage, bf16


class MetricsFile(JsonLines):
    """Steps that are taken again after a kill keep the line of the first time: they were told to others by then, and
    they are the same steps. Where they turn out not to be, that is said, and their lines are replaced."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._before: dict[int, dict[str, Any]] = {}

    def go_on(self, step: int, num_steps: int) -> None:
        """The run goes on after ``step``, to ``num_steps``; lines of later ones, and a torn one, are dropped."""
        self.rewind(num_steps)
        self._before = {line["step"]: line for line in self.read() if line["step"] > step}

    def note(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Append the line of a step, unless it has one; returns the line that stands.

        None, and no line, for a step that had none while later ones do: their rhythm goes on to their end.
        """
        before = self._before.pop(record["step"], None)
        if before is not None and all(_same(before[name], record[name]) for name in ("loss", "lr")):
            return before
        if before is not None:
            log.warning(
                "step %d was taken again with loss %s and lr %s, it had %s and %s: from here on %s has the new ones; "
                "MLflow keeps those it has",
                *(record[name] for name in ("step", "loss", "lr")),
                *(before[name] for name in ("loss", "lr")),
                self.path,
            )
            self.rewind(record["step"] - 1)
            self._before = {}
        elif any(step > record["step"] for step in self._before):
            return None
        self.append(record)
        return record


def _same(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=_ROUNDING)
