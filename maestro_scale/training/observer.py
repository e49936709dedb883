"""The protocol of observers (terminal, MLflow): rank 0 notifies them of events of a run and never waits for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class RunInfo:
    """Passed to observers when a run starts or resumes. ``step``: finished steps; ``num_steps``: of the whole run."""

    run_dir: Path
    step: int
    num_steps: int
    global_batch: int


@dataclass(frozen=True)
class SensorView:
    """One sensor of one sample, in network units. ``pixels``, ``reconstruction``: (D, C, H, W) float32;
    ``hidden``: (D, H, W) bool, where any band was masked; ``embedding``: (G, G, E) float32, the encoder's tokens with
    nothing masked, averaged over dates and groups of bands."""

    name: str
    bands: tuple[str, ...]
    pixels: np.ndarray
    hidden: np.ndarray
    reconstruction: np.ndarray
    embedding: np.ndarray


class Observer(Protocol):
    """Notified of the events of a run; must not raise and must not block."""

    def started(self, info: RunInfo) -> None:
        """The run starts, or resumes, at ``info.step``."""

    def logged(self, record: dict[str, Any]) -> None:
        """A line was written to metrics.jsonl."""

    def pictured(self, step: int, views: list[SensorView]) -> None:
        """A sample was reconstructed."""

    def finished(self, reason: str) -> None:
        """The run is over: ``done``, ``stopped`` or ``failed``."""
