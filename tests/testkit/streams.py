"""Streams of a device that computes nothing: they record what is queued on them, in one log for the whole device.

A batch moves to the ``meta`` device, so copies are those that a real accelerator would make. A kernel or a copy is done
once ``FakeDevice.run`` was called after it was queued.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_scale.stream.batch import Batch
from maestro_scale.stream.loader import Step
from maestro_scale.stream.packing import BatchMetadata, Field, num_bytes, unpack

META = torch.device("meta")


@dataclass
class FakeEvent:
    """``position``: length of the device's log when it was recorded."""

    device: FakeDevice
    position: int

    def query(self) -> bool:
        return self.position <= self.device.num_done

    def synchronize(self) -> None:
        self.device.log.append(("host", "waits"))
        self.device.num_done = max(self.device.num_done, self.position)


@dataclass
class FakeStream:
    """Also a context manager: what is queued meanwhile is on this stream."""

    device: FakeDevice
    name: str

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.device, len(self.device.log))

    def wait_event(self, event: FakeEvent) -> None:
        self.device.log.append((self.name, f"waits for {event.position}"))

    def __enter__(self) -> FakeStream:
        self.device.current.append(self)
        return self

    def __exit__(self, *args: object) -> None:
        self.device.current.pop()


@dataclass
class FakeDevice:
    """``log``: (stream, operation) in the order of queueing; ``num_done``: entries that the device has executed.
    ``recorded``: bytes of each tensor that was recorded on a stream."""

    log: list[tuple[str, str]] = field(default_factory=list)
    num_done: int = 0
    recorded: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.current = [FakeStream(self, "compute")]
        self.sides: list[FakeStream] = []

    def install(self, monkeypatch) -> FakeDevice:
        def side_stream(device: torch.device) -> FakeStream | None:
            if device.type == "cpu":
                return None
            self.sides.append(FakeStream(self, f"side {len(self.sides)}"))
            return self.sides[-1]

        module = "maestro_scale.stream.device_copy"
        monkeypatch.setattr(f"{module}.side_stream", side_stream)
        monkeypatch.setattr(f"{module}.compute_stream", lambda device: self.current[-1])
        monkeypatch.setattr(f"{module}.on_stream", lambda stream, device: stream)
        monkeypatch.setattr("maestro_scale.training.prefetch.compute_stream", lambda device: self.current[-1])
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: self.recorded.append(t.nbytes))
        return self

    def compute(self, what: str) -> None:
        self.log.append((self.current[-1].name, what))

    def run(self) -> None:
        self.num_done = len(self.log)


class Copies(TorchDispatchMode):
    """While active, logs copies from the host to the fake device, with their bytes, on the current stream."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device, self.sizes = device, list[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name == "aten::_to_copy" and kwargs.get("device") == META:
            self.sizes.append(args[0].nbytes)
            self.device.compute("copy" if kwargs.get("non_blocking") else "blocking copy")
        return func(*args, **kwargs)


FIELDS = (
    Field("pixels", "s2", (2, 3), "uint16"),
    Field("noise", "s2", (5,), "float32"),
    Field("ref_date", "", (3,), "int16"),
)


def batch_of(name: str) -> Batch:
    block = torch.zeros(num_bytes(FIELDS, 4), dtype=torch.uint8)
    return unpack(block, FIELDS, BatchMetadata("d", tuple(f"0/{name}/{i}" for i in range(4)), (), 0, 0))


def step_of(number: int) -> Step:
    batches = tuple(batch_of(f"{number}.{i}") for i in range(2))
    return Step(number, 0, 8 * number, "d", number, batches, {"filled": number})


def steps_of(count: int, error: Exception | None = None) -> Iterator[Step]:
    """Steps of two packed micro-batches of 216 bytes, then ``error``."""
    for number in range(1, count + 1):
        yield step_of(number)
    if error is not None:
        raise error
