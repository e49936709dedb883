"""Progress of a long job: the callback type, and a counter that feeds it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, int], None]
"""Called with the number of samples done, the total number of samples, and the bytes processed by this run."""


class ProgressCounter:
    """Adds up the reports of workers and passes the totals to a :data:`Progress` callback.

    ``num_done``: samples that an earlier run finished.
    """

    def __init__(self, num_done: int, num_samples: int, progress: Progress | None) -> None:
        self._num_done, self._bytes, self._num_samples = num_done, 0, num_samples
        self._progress = progress
        self(0, 0)

    def __call__(self, samples: int, num_bytes: int) -> None:
        self._num_done += samples
        self._bytes += num_bytes
        if self._progress is not None:
            self._progress(self._num_done, self._num_samples, self._bytes)
