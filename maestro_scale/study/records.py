"""What the analysis of a study reads: the cells with their levels and seeds, and where the results of each are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation of a cell, finished or not."""

    benchmark: str
    """Name of the evaluation in the study."""
    mode: str
    """``knn``, ``probe``, ``attentive``, ``finetune``, ``scratch`` or ``oracle``."""
    path: Path
    """Of its ``results.json``, which need not exist yet; ``counts.npz`` is beside it."""
    fraction: float = 1.0
    """Of the training labels."""


@dataclass(frozen=True)
class CellRecord:
    """A cell of a study: one encoder with one seed."""

    name: str
    """Of its directory."""
    dataset: str
    """Name of the setup."""
    seed: int
    levels: Mapping[str, str] = field(default_factory=dict)
    """Level by factor; empty for a baseline."""
    baseline: str = ""
    """Name of the baseline, of a cell that is one."""
    evaluations: Sequence[EvaluationRecord] = ()
    seconds: float | None = None
    """Wall time of pretraining and evaluations; None where it is unknown."""
    gpus: int = 0
    """GPUs that were in use for ``seconds``."""
    machines: tuple[str, ...] = ()
    """Threads and kind of device of its processes, as ``1 thread, CPU``; several where its starts differ."""
