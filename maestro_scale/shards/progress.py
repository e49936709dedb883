"""How far a long job is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, int], None]
"""Called with samples done, samples in all, and bytes handled by this call."""


class ProgressCounter:
    """Adds up what workers report and tells the caller."""

    def __init__(self, num_kept: int, num_samples: int, progress: Progress | None) -> None:
        self._done, self._bytes, self._num_samples = num_kept, 0, num_samples
        self._progress = progress
        self(0, 0)

    def __call__(self, samples: int, num_bytes: int) -> None:
        self._done += samples
        self._bytes += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._num_samples, self._bytes)
