"""Streams and events of the simulated device, and a detector of data races between streams and the host.

Operations run at once, in program order, so a race cannot corrupt anything here. It is found by vector clocks: each
stream counts its operations, an event carries the counts that a stream had reached, and waiting merges them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from testkit.simulated.recorder import RACE, STREAM, SYNC, Recorder

Clock = dict[int, int]  # operations known to have finished, by stream


def _merge(into: Clock, other: Clock) -> None:
    for stream, count in other.items():
        into[stream] = max(into.get(stream, 0), count)


class _Memory:
    """Who used a storage: the stream of its allocation, the last write, the last read of each stream."""

    def __init__(self, storage: torch.UntypedStorage, allocated_on: int | None) -> None:
        self.ref = StorageWeakRef(storage)
        self.allocated_on = allocated_on  # None: host memory
        self.written: tuple[int, int] | None = None
        self.reads: Clock = {}
        self.recorded: set[int] = set()  # streams named by record_stream
        self.uses: Clock = {}


class Timeline:
    """Clocks of all streams, and the users of all storages."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.host: Clock = {}
        self.clocks: dict[int, Clock] = {0: {}}
        self._memory: dict[int, _Memory] = {}
        self._shared: list[_Memory] = []  # used on another stream than that of the allocation
        self._lock = threading.RLock()

    def run(self, op: str, stream: int, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        """An asynchronous operation on ``stream``, with tensors of the device and page-locked ones."""
        with self._lock:
            clock = self.clocks[stream]
            _merge(clock, self.host)  # it is issued after what the host has waited for
            self._check_freed()
            clock[stream] = clock.get(stream, 0) + 1
            for tensor in reads:
                memory = self._of(tensor, stream)
                self._require(
                    clock,
                    memory.written,
                    op,
                    f"reads what stream {{}} may not have written yet, {_of(tensor)}",
                )
                memory.reads[stream] = memory.uses[stream] = clock[stream]
            for tensor in writes:
                memory = self._of(tensor, stream)
                for used in [memory.written, *memory.reads.items()]:
                    self._require(
                        clock, used, op, f"overwrites what stream {{}} may still use, {_of(tensor)}"
                    )
                memory.written = (stream, clock[stream])
                memory.reads = {}
                memory.uses[stream] = clock[stream]

    def host_uses(self, op: str, tensor: torch.Tensor, writes: bool) -> None:
        """The host reads or writes memory of its own, which an asynchronous copy may use."""
        with self._lock:
            memory = self._memory.get(tensor.untyped_storage()._cdata)
            if memory is None:
                return
            self._require(
                self.host, memory.written, op, "the host uses what stream {} may not have written yet"
            )
            if writes:
                for used in memory.reads.items():
                    self._require(self.host, used, op, "the host overwrites what stream {} may still read")

    def record_stream(self, tensor: torch.Tensor, stream: int) -> None:
        """The memory of ``tensor`` is not reused before ``stream`` has finished what it was given so far."""
        with self._lock:
            self._of(tensor, stream).recorded.add(stream)

    def wait_host(self, stream: int | None) -> None:
        """The host waits for a stream; None: for all."""
        with self._lock:
            for number in [stream] if stream is not None else list(self.clocks):
                _merge(self.host, self.clocks[number])

    def _require(self, clock: Clock, used: tuple[int, int] | None, op: str, what: str) -> None:
        if used is not None and clock.get(used[0], 0) < used[1]:
            self.recorder.add(RACE, op, detail=what.format(used[0]))

    def _of(self, tensor: torch.Tensor, stream: int) -> _Memory:
        storage = tensor.untyped_storage()
        memory = self._memory.get(storage._cdata)
        if memory is None:
            if len(self._memory) > 20_000:
                self._memory = {k: m for k, m in self._memory.items() if not m.ref.expired()}
            allocated_on = None if tensor.device.type == "cpu" else stream
            memory = self._memory[storage._cdata] = _Memory(storage, allocated_on)
        if memory.allocated_on not in (None, stream) and memory not in self._shared:
            self._shared.append(memory)
        return memory

    def _check_freed(self) -> None:
        # The allocator gives freed memory to the next operation on the stream of the allocation, which may run before
        # another stream has finished with it, unless that stream was named by record_stream.
        for memory in [m for m in self._shared if m.ref.expired()]:
            self._shared.remove(memory)
            owner = memory.allocated_on
            assert owner is not None
            for stream, count in memory.uses.items():
                # The host's clock too: whatever is issued on the stream from now on follows what the host waited for.
                done = max(self.clocks[owner].get(stream, 0), self.host.get(stream, 0)) >= count
                if stream != owner and stream not in memory.recorded and not done:
                    what = f"freed on stream {owner} while stream {stream} may still use it (record_stream)"
                    self.recorder.add(RACE, "free", detail=what)


def _of(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


class DeviceModule:
    """What ``torch.get_device_module("simulated")`` returns: the functions of ``torch.cuda`` that programs use."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.timeline = recorder, Timeline(recorder)
        self._current = threading.local()
        self._default = Stream.__new__(Stream)
        self._default.module, self._default.stream_id = self, 0
        self.Stream: Callable[..., Stream] = lambda *args, **kwargs: Stream(self)
        self.Event: Callable[..., Event] = lambda *args, **kwargs: Event(self)

    def current_stream(self, device: Any = None) -> Stream:
        """The stream that operations of this thread are issued on."""
        return getattr(self._current, "stream", self._default)

    def default_stream(self, device: Any = None) -> Stream:
        """Stream 0."""
        return self._default

    def set_stream(self, stream: Stream) -> None:
        """Issue operations of this thread on ``stream``."""
        self._current.stream = stream

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """Issue operations on ``stream`` within the block; None: no change."""
        before = self.current_stream()
        self.set_stream(stream or before)
        try:
            yield
        finally:
            self.set_stream(before)

    def synchronize(self, device: Any = None) -> None:
        """Wait for all streams."""
        self.recorder.add(SYNC, "synchronize", self.current_stream().stream_id)
        self.timeline.wait_host(None)

    # -- constants that torch and DeepSpeed ask for -------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def get_device_name(self, device: Any = None) -> str:
        return "Simulated"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_device_properties(self, device: Any = None) -> Any:
        return type(
            "Properties", (), {"total_memory": 80 * 10**9, "name": "Simulated", "multi_processor_count": 1}
        )

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def max_memory_allocated(self, device: Any = None) -> int:
        return 0

    def max_memory_reserved(self, device: Any = None) -> int:
        return 0

    def memory_reserved(self, device: Any = None) -> int:
        return 0

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 80 * 10**9, 80 * 10**9

    def utilization(self, device: Any = None) -> int:
        return 0

    def manual_seed(self, seed: int) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


class Stream:
    """As ``torch.cuda.Stream``."""

    module: DeviceModule
    stream_id: int

    def __init__(self, module: DeviceModule) -> None:
        self.module, self.stream_id = module, len(module.timeline.clocks)
        module.timeline.clocks[self.stream_id] = {}

    def record_event(self, event: Event | None = None) -> Event:
        """An event that is reached when all operations issued so far have finished."""
        event = event or Event(self.module)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Later operations of this stream wait for the event; the host does not."""
        self.module.recorder.add(STREAM, "wait", self.stream_id, f"for {event.recorded_on}")
        _merge(self.module.timeline.clocks[self.stream_id], event.clock)

    def wait_stream(self, stream: Stream) -> None:
        """Later operations of this stream wait for all issued on ``stream`` so far."""
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        """The host waits for the stream."""
        self.module.recorder.add(SYNC, "stream.synchronize", self.stream_id)
        self.module.timeline.wait_host(self.stream_id)

    def query(self) -> bool:
        """Whether all operations have finished; never certain here before a synchronisation."""
        timeline = self.module.timeline
        return timeline.clocks[self.stream_id].get(self.stream_id, 0) <= timeline.host.get(self.stream_id, 0)

    def __enter__(self) -> Stream:
        self._context = self.module.stream(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


class Event:
    """As ``torch.cuda.Event``."""

    def __init__(self, module: DeviceModule) -> None:
        self.module = module
        self.clock: Clock = {}
        self.recorded_on: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Reached when all operations issued on ``stream`` (default: the current one) so far have finished."""
        stream = stream or self.module.current_stream()
        self.recorded_on = stream.stream_id
        self.clock = dict(self.module.timeline.clocks[stream.stream_id])
        self.module.recorder.add(STREAM, "record", stream.stream_id)

    def wait(self, stream: Stream | None = None) -> None:
        """Later operations of ``stream`` (default: the current one) wait for the event."""
        (stream or self.module.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits for the event."""
        self.module.recorder.add(SYNC, "event.synchronize", self.module.current_stream().stream_id)
        _merge(self.module.timeline.host, self.clock)

    def query(self) -> bool:
        """Whether the event is reached; see ``Stream.query``."""
        host = self.module.timeline.host
        return all(host.get(stream, 0) >= count for stream, count in self.clock.items())

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between two events; not measured."""
        return 1.0
