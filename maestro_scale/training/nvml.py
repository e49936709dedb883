"""Readings of a GPU by NVML (package nvidia-ml-py). Each is None where NVML, or this device, does not provide it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def driver_version() -> str | None:
    """The version of the NVIDIA driver."""
    return _read(lambda nvml: _text(nvml.nvmlSystemGetDriverVersion()))


def used_bytes(gpu: str) -> int | None:
    """Memory of the GPU in use by all processes. ``gpu``: its UUID (``GPU-…`` or ``MIG-…``)."""
    return _read(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, gpu)).used))


def utilization_percent(gpu: str) -> float | None:
    """Share of the last sampling period in which a kernel ran. Not provided for MIG instances and many vGPUs."""
    return _read(lambda nvml: float(nvml.nvmlDeviceGetUtilizationRates(_handle(nvml, gpu)).gpu))


def pci_id(gpu: str) -> str | None:
    """PCI address as sysfs names it: ``0000:3b:00.0``."""
    return _read(lambda nvml: _sysfs_id(_text(nvml.nvmlDeviceGetPciInfo(_handle(nvml, gpu)).busId)))


def _handle(nvml: Any, gpu: str) -> Any:
    # By UUID: NVML numbers all GPUs of the machine, torch only those of CUDA_VISIBLE_DEVICES.
    return nvml.nvmlDeviceGetHandleByUUID(gpu)


def _read(read: Callable[[Any], T]) -> T | None:
    """``read(pynvml)``, or None. Metrics must never end a run, whatever the driver answers."""
    try:
        import pynvml

        pynvml.nvmlInit()  # counted by NVML: cheap after the first call
        return read(pynvml)
    except Exception:  # noqa: BLE001 - bindings that are older than the driver, or broken, raise any type
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes in releases before 11.5


def _sysfs_id(bus_id: str) -> str:
    domain, rest = bus_id.split(":", 1)  # NVML prints 8 digits of the domain, sysfs 4
    return f"{int(domain, 16):04x}:{rest.lower()}"
