"""Python's garbage collector, on a schedule: left alone it stops each rank at another moment, and all wait for each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_every(every: int) -> Iterator[Callable[[int], None]]:
    """Yields ``collect(step)``, which collects when ``step`` is a multiple; 0 leaves the collector to itself."""
    if every == 0:
        yield lambda step: None
        return

    def collect(step: int) -> None:
        if step % every == 0:
            gc.collect()

    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield collect
    finally:
        if was_enabled:
            gc.enable()
