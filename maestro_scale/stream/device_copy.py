"""Copies between host and device on side streams, so that they run while the device computes: batches in, results out.

The same calls on a CPU: there is no stream, and nothing is copied. Only the generic
``torch.Stream`` and ``torch.accelerator`` are used, and only through the functions at the end of this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maestro_scale.stream.batch import Batch


@dataclass(frozen=True)
class PendingCopies:
    """Batches on the device whose copies may still run; ``copied`` is recorded after the last one, None on a CPU."""

    batches: list[Batch]
    copied: torch.Event | None


class DeviceCopier:
    """Copies batches to ``device``: ``start`` queues the copies, ``finish`` lets the compute stream use them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = side_stream(device)

    def start(self, batches: Sequence[Batch]) -> PendingCopies:
        """Queue one copy per batch (``Batch.to``) and return at once.

        The batches are in pinned memory, else the host waits. torch's allocator of pinned memory does not reuse a block
        before its copy is done, even if the batch is dropped.
        """
        if self._stream is None:
            return PendingCopies([b.to(self._device) for b in batches], None)
        # The blocks are allocated on the side stream: memory that belongs to the compute stream could still be in use
        # by kernels that are queued there, and the copy would have to wait for them.
        with on_stream(self._stream, self._device):
            copies = [b.to(self._device, non_blocking=True) for b in batches]
        return PendingCopies(copies, self._stream.record_event())

    def finish(self, copies: PendingCopies) -> list[Batch]:
        """The batches on the device: what is queued on the compute stream from now on runs after their copies."""
        if copies.copied is not None:
            stream = compute_stream(self._device)
            stream.wait_event(copies.copied)
            for batch in copies.batches:
                # Without it the allocator would give the memory to the next copy as soon as the batch is dropped here,
                # while kernels of the compute stream that read it are still queued.
                for tensor in batch.tensors if batch.block is None else (batch.block,):
                    tensor.record_stream(stream)
        return copies.batches


@dataclass(frozen=True)
class PendingResults:
    """Results whose copies to the host may still run; ``copied`` is recorded after the last one, None on a CPU."""

    copies: dict[str, Tensor]
    copied: torch.Event | None

    def wait(self) -> dict[str, np.ndarray]:
        """The results, once they have arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        return {name: copy.numpy() for name, copy in self.copies.items()}


class HostCopier:
    """Copies results of ``device`` to pinned host memory. Its stream is not that of :class:`DeviceCopier`, where the
    next batch would wait behind the results of this one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = side_stream(device)

    def start(self, results: Mapping[str, Tensor]) -> PendingResults:
        """Queue the copies, to run when what is queued on the compute stream by now is done; returns at once."""
        if self._stream is None:
            return PendingResults(dict(results), None)
        self._stream.wait_event(compute_stream(self._device).record_event())
        copies: dict[str, Tensor] = {}
        with on_stream(self._stream, self._device):
            for name, result in results.items():
                pinned = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
                copies[name] = pinned.copy_(result, non_blocking=True)
                result.record_stream(self._stream)  # its memory is not reused before the copy is done
        return PendingResults(copies, self._stream.record_event())


def side_stream(device: torch.device) -> torch.Stream | None:
    """A new stream of ``device``; None on a CPU, which has none."""
    return None if device.type == "cpu" else torch.Stream(device=device)


def compute_stream(device: torch.device) -> torch.Stream:
    """The stream on which ``device`` computes."""
    return torch.accelerator.current_stream(device)


@contextmanager
def on_stream(stream: torch.Stream, device: torch.device) -> Iterator[None]:
    """Queue operations of ``device`` on ``stream`` within the block."""
    before = compute_stream(device)
    torch.accelerator.set_stream(stream)  # ``with stream`` needs torch 2.7
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
