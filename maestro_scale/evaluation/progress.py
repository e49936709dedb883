"""How far an evaluation is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from maestro_scale.shards.progress import Progress

ProgressFactory = Callable[[str, str], AbstractContextManager[Progress]]
"""Given a title and a unit, and entered while that lasts; see ``tracking.terminal.progress``."""


@contextmanager
def no_progress(title: str, unit: str) -> Iterator[Progress]:
    """Shows nothing."""
    yield lambda done, total, num_bytes: None
