"""Progress of an evaluation, reported through functions that the caller passes in: nothing here prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from maestro_scale.shards.progress import Progress

ProgressFactory = Callable[[str, str], AbstractContextManager[Progress]]
"""(title, unit) -> a context that lasts as long as the job and yields its progress function.

For example ``tracking.terminal.progress``.
"""


@contextmanager
def no_progress(title: str, unit: str) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda done, total, num_bytes: None
