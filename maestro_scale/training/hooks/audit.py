"""Records which samples every step used: ``audit/rankNNNNN.jsonl``."""

from __future__ import annotations

from maestro_scale.stream.batch import digest
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.run_dir import JsonLines


class AuditHook(Hook):
    """A line per step: the keys of this rank's samples, and a digest of each micro-batch on the host."""

    def __init__(self, lines: JsonLines) -> None:
        self._lines = lines

    def after_step(self, step: FinishedStep) -> bool:
        """Append the line."""
        batches = step.data.batches
        keys, digests = [k for b in batches for k in b.keys], [digest(b) for b in batches]
        self._lines.append({"step": step.position.step, "keys": keys, "digest": digests})
        return False
