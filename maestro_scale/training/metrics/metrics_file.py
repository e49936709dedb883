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
    """A step that is repeated after a kill keeps the line of its first time.

    It is the same step, and its line may have been sent to MLflow already. If it differs, a warning says so
    and the old lines are replaced.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._before: dict[int, dict[str, Any]] = {}

    def resume_from(self, step: int, num_steps: int) -> None:
        """The run resumes after ``step``, to ``num_steps``. Drops lines past ``num_steps`` and incomplete ones."""
        self.rewind(num_steps)
        self._before = {line["step"]: line for line in self.read() if line["step"] > step}

    def append_step(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Append the line of a step, unless it has one; returns the line in the file.

        None, and no line, for a step without a line while later steps have one: ``train.log_every`` was changed, and
        the old interval holds until the repeated steps are over.
        """
        before = self._before.pop(record["step"], None)
        if before is not None and all(_same(before[name], record[name]) for name in ("loss", "lr")):
            return before
        if before is not None:
            log.warning(
                "step %d was repeated with loss %s and lr %s, before it had %s and %s: %s has the new values from here "
                "on, MLflow keeps the old ones",
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
