"""Prefetch of the next step: its batches are copied to the device while the current step is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from maestro_scale.stream.batch import Batch
from maestro_scale.stream.device_copy import DeviceCopier, PendingCopies, compute_stream
from maestro_scale.stream.loader import Step


class StepPrefetcher:
    """Hands out the steps of a loader with their batches on ``device``, at most one step in advance.

    At most two steps' batches are on the device, if the caller drops those of a step before it fetches again: those
    that ``take`` returned last, and those of the next step. Nothing of a step is visible before ``take`` returns it: a
    run that stops may have fetched a step that it does not use, and resumes with that step.
    """

    def __init__(self, steps: Iterator[Step], device: torch.device) -> None:
        self._steps, self._device, self._copier = steps, device, DeviceCopier(device)
        self._fetched: tuple[Step, PendingCopies] | Exception | None = None
        self.waited_s = 0.0
        """Time that the device had nothing to compute because the loader had no data yet, since the start; on an
        accelerator at most that, as the host does not know when the device ran out of work."""

    def fetch(self) -> None:
        """Take the next step from the loader and queue its copies, unless that is done already.

        To be called once the kernels of the current step are queued: it waits for the loader if the data is late. An
        error of the loader, or its end, is raised by ``take``: the current step must not be lost.
        """
        if self._fetched is not None:
            return
        queued = None if self._device.type == "cpu" else compute_stream(self._device).record_event()
        before = time.perf_counter()
        try:
            step = next(self._steps)
            self._fetched = step, self._copier.start(step.batches)
        except Exception as error:  # noqa: BLE001 - raised by ``take``
            self._fetched = error
        if queued is None or queued.query():  # else the device is still busy: nothing has waited
            self.waited_s += time.perf_counter() - before

    def take(self) -> tuple[Step, list[Batch]]:
        """(the next step, its batches on the device). Raises the loader's errors; StopIteration after the last step."""
        self.fetch()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None  # fetch() sets it
        if isinstance(fetched, Exception):
            raise fetched
        step, copies = fetched
        return step, self._copier.finish(copies)
