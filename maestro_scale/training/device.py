"""The device of this process: its selection, memory statistics, and the CPUs next to it."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Literal

import torch

from maestro_scale.training import nvml
from maestro_scale.training.binding import Binding, bind, identify, refuse_idle_gpus

DeviceSetting = Literal["auto", "cpu"]
"""Values of ``train.device``. auto: the GPU of this rank, or the CPU on a node without GPUs."""


def bind_process(setting: DeviceSetting = "auto") -> Binding:
    """The binding of this process. DeviceError where it would leave GPUs unused, or share one with another rank."""
    num_visible = torch.cuda.device_count() if setting == "auto" and torch.cuda.is_available() else 0
    if setting == "auto" and not num_visible:
        refuse_idle_gpus(os.environ, torch.version.cuda or torch.version.hip)
    return bind(os.environ, num_visible)


def use_device(binding: Binding) -> torch.device:
    """The torch device of a binding, made the current one: pinned memory and streams belong to the current device."""
    if binding.index is None:
        return torch.device("cpu")
    device = torch.device("cuda", binding.index)
    torch.cuda.set_device(device)
    return device


def gpu_id(device: torch.device) -> str:
    """UUID of a CUDA device, ``GPU-…`` or ``MIG-…``; empty for other devices."""
    if device.type != "cuda":
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # not on every ROCm
    return identify(str(uuid), os.environ) if uuid is not None else ""


def pci_id(device: torch.device) -> str | None:
    """PCI address of a CUDA device as sysfs names it; None where it is not known."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the PCI fields
    try:
        address = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    except AttributeError:  # torch before 2.9
        return nvml.pci_id(gpu_id(device))
    return "{:04x}:{:02x}:{:02x}.0".format(*address)


def device_module(device: torch.device) -> ModuleType | None:
    """``torch.cuda`` and its like, with streams and memory statistics; None for a CPU."""
    if device.type == "cpu":
        return None
    try:
        return torch.get_device_module(device)
    except RuntimeError:  # a backend that registers no module
        return None


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of the device."""
    if (module := device_module(device)) is not None and hasattr(module, "synchronize"):
        module.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the statistics behind ``peak_memory_bytes``."""
    if (module := device_module(device)) is not None and hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory that tensors used on the device since the last reset; None where there are no statistics."""
    if (module := device_module(device)) is not None and hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device)
    return None


def total_memory_bytes(device: torch.device) -> int | None:
    """Memory of the device; None for a CPU, and where the backend does not tell."""
    if (module := device_module(device)) is not None and hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[1]
    return None


def used_memory_bytes(device: torch.device) -> int | None:
    """Memory of the device in use by all processes; None where the backend does not tell."""
    if (module := device_module(device)) is not None and hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        return total - free
    return None
