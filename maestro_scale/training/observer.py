"""Whoever watches a run: the loop tells observers what happened, on rank 0, and never waits for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class RunInfo:
    """What observers learn when a run starts or resumes. ``step`` is where it stands, ``num_steps`` where it ends."""

    run_dir: Path
    step: int
    num_steps: int
    global_batch: int


@dataclass(frozen=True)
class SensorView:
    """One tile through one sensor, in network units. ``pixels``, ``reconstruction``: (D, C, H, W) float32;
    ``hidden``: (D, H, W) bool, where any band was masked; ``embedding``: (G, G, E) float32, the encoder's tokens with
    nothing masked, averaged over dates and groups of bands."""

    name: str
    bands: tuple[str, ...]
    pixels: np.ndarray
    hidden: np.ndarray
    reconstruction: np.ndarray
    embedding: np.ndarray


class Observer(Protocol):
    """Told of a run's life; must not raise and must not block."""

    def started(self, info: RunInfo) -> None:
        """The run starts, or resumes, at ``info.step``."""

    def logged(self, record: dict[str, Any]) -> None:
        """A line was written to metrics.jsonl."""

    def pictured(self, step: int, views: list[SensorView]) -> None:
        """A sample was reconstructed."""

    def finished(self, reason: str) -> None:
        """The run is over: ``done``, ``stopped`` or ``failed``."""
