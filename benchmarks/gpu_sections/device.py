"""The device under test: every call that only a GPU supports, each with its answer for a CPU."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import maestro_scale

_OURS = str(Path(maestro_scale.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_WAIT = "synchronizing CUDA operation"  # in torch's warning, c10/cuda/CUDAFunctions.h
# Calls of the CUDA runtime that block the host until the device is done.
_BLOCKING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
)


@dataclass(frozen=True)
class Device:
    """A CUDA GPU, or the CPU in a rehearsal."""

    torch: torch.device

    @staticmethod
    def detect(rehearse: bool) -> Device:
        """The first GPU; the CPU in a rehearsal, also where there is a GPU."""
        return Device(torch.device("cpu") if rehearse else torch.device("cuda", 0))

    @property
    def is_gpu(self) -> bool:
        """Whether GPU measurements exist."""
        return self.torch.type == "cuda"

    @property
    def name(self) -> str:
        """Name of the GPU model, or the number of CPU threads."""
        return (
            torch.cuda.get_device_name(self.torch)
            if self.is_gpu
            else f"CPU, {torch.get_num_threads()} threads"
        )

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.is_gpu:
            torch.cuda.synchronize(self.torch)

    def start_peak(self) -> None:
        """Return cached memory, and begin to measure the peak."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peak_bytes(self) -> int | None:
        """Peak bytes of tensors since ``start_peak``; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.torch) if self.is_gpu else None

    def reserved_bytes(self) -> int | None:
        """Peak bytes that the allocator took from the GPU since ``start_peak``; None on a CPU."""
        return torch.cuda.max_memory_reserved(self.torch) if self.is_gpu else None

    def num_gpus(self) -> int:
        """Number of visible GPUs."""
        return torch.cuda.device_count() if self.is_gpu else 0

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """Mean seconds of a call, after one that is not counted."""
        call()
        self.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            call()
        self.synchronize()
        return (time.perf_counter() - started) / times

    def set_sync_debug(self, mode: str) -> None:
        """``torch.cuda.set_sync_debug_mode``; nothing on a CPU."""
        if self.is_gpu:
            torch.cuda.set_sync_debug_mode(mode)


def exact_fp32() -> None:
    """No TF32: matrix products of fp32 tensors in fp32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class Wait:
    """A host synchronisation. ``owner``: ``maestro_scale``, ``deepspeed`` or another package; ``place``: its file and
    line; ``called``: the innermost line of maestro_scale that led to it; ``backward``: inside the backward pass."""

    owner: str
    place: str
    called: str
    backward: bool


class WaitRecorder:
    """Records torch's warnings of host synchronisations with the Python stack of each.

    The file of the warning itself is that of the innermost frame, often torch's; the stack also shows who called it.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.waits: list[Wait] = []
        self._catch: warnings.catch_warnings[Any] | None = None

    def start(self) -> None:
        """Record from now on."""
        self.waits = []
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._show
        self._device.set_sync_debug("warn")

    def stop(self) -> list[Wait]:
        """End the recording; the synchronisations since ``start``."""
        self._device.set_sync_debug("default")
        if self._catch is not None:
            self._catch.__exit__(None, None, None)
            self._catch = None
        return self.waits

    def _show(self, message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if _WAIT in str(message):
            self.waits.append(locate(traceback.extract_stack()[:-1]))


def locate(stack: Sequence[traceback.FrameSummary]) -> Wait:
    """The synchronisation that happened at the end of ``stack`` (outermost frame first)."""
    frames = [f for f in stack if not f.filename.endswith("/warnings.py") and f.filename != __file__]
    outside = [f for f in frames if not f.filename.startswith(_TORCH)]
    ours = [f for f in frames if f.filename.startswith(_OURS)]
    last = outside[-1] if outside else frames[-1]
    return Wait(
        owner=_package(last.filename),
        place=_place(last),
        called=_place(ours[-1]) if ours else "",
        backward=any(f.filename.startswith(f"{_TORCH}/autograd") for f in frames),
    )


def _package(filename: str) -> str:
    if filename.startswith(_OURS):
        return "maestro_scale"
    parts = Path(filename).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    return "torch" if filename.startswith(_TORCH) else Path(filename).stem


def _place(frame: traceback.FrameSummary) -> str:
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


@dataclass(frozen=True)
class KernelProfile:
    """Activity of one step. Numbers are None on a CPU, ``operations`` are those of the CPU.

    ``kernels``: run on the device; ``launches``: calls that started them (a CUDA graph is one); ``waits``: blocking
    calls of the runtime, by name. ``busy_s``: time in which at least one kernel ran. ``top``: (name, seconds, count)
    of the kernels, or of the operations on a CPU, that take the most time.
    """

    wall_s: float
    operations: int
    kernels: int | None
    launches: int | None
    waits: dict[str, int] | None
    busy_s: float | None
    top: list[tuple[str, float, int]]
    attention: list[str]


@contextmanager
def profiled(device: Device) -> Iterator[list[KernelProfile]]:
    """Profile the block; the list holds the profile after it."""
    from torch.profiler import ProfilerActivity, profile

    result: list[KernelProfile] = []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_gpu else [])]
    device.synchronize()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        yield result
        device.synchronize()
        wall_s = time.perf_counter() - started
    result.append(summarize(profiler.profiler.kineto_results.events(), wall_s, device.is_gpu))


def summarize(events: Sequence[Any], wall_s: float, is_gpu: bool) -> KernelProfile:
    """The profile of kineto events (``name()``, ``device_type()``, ``start_ns()``, ``duration_ns()``)."""
    kernels = [e for e in events if _is_kernel(e)]
    host = [e for e in events if "CPU" in str(e.device_type())]
    names = Counter(e.name() for e in host)
    operations = sum(n for name, n in names.items() if name.startswith("aten::"))
    timed = kernels if is_gpu else [e for e in host if e.name().startswith("aten::")]
    seconds: Counter[str] = Counter()
    for e in timed:
        seconds[e.name()] += e.duration_ns()
    counts = Counter(e.name() for e in timed)
    attention = sorted({e.name()[:120] for e in timed if _is_attention(e.name())})
    return KernelProfile(
        wall_s=wall_s,
        operations=operations,
        kernels=len(kernels) if is_gpu else None,
        launches=sum(names[n] for n in _LAUNCHES) if is_gpu else None,
        waits={n: names[n] for n in _BLOCKING if names[n]} if is_gpu else None,
        busy_s=_union_ns([(e.start_ns(), e.duration_ns()) for e in kernels]) / 1e9 if is_gpu else None,
        top=[(name[:120], ns / 1e9, counts[name]) for name, ns in seconds.most_common(15)],
        attention=attention,
    )


def _is_kernel(event: Any) -> bool:
    """A kernel, copy or fill on the device. Annotated ranges (``Optimizer.step#AdamW.step``) and waits are recorded
    on the device, too, and are neither."""
    if "CUDA" not in str(event.device_type()):
        return False
    kind = getattr(event, "activity_type", str)()  # not in every torch version
    if kind:
        return kind in ("kernel", "gpu_memcpy", "gpu_memset")
    return "#" not in event.name() and "Sync" not in event.name() and "Wait Event" not in event.name()


def _is_attention(name: str) -> bool:
    return any(part in name.lower() for part in ("flash", "fmha", "attention", "sdpa"))


def _union_ns(intervals: list[tuple[int, int]]) -> int:
    """Length of the union of (start, duration)."""
    total, end = 0, 0
    for start, duration in sorted(intervals):
        total += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total
