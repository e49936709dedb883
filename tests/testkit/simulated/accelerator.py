"""The simulated device as DeepSpeed's accelerator: it answers as the CUDA accelerator where DeepSpeed branches."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from testkit.simulated.tensor import DEVICE, NAME, SimulatedTensor, module


class SimulatedAccelerator(CPU_Accelerator):
    """Builds no kernels, as the CPU accelerator, and is asynchronous, as CUDA. Collectives run over Gloo."""

    def __init__(self) -> None:
        super().__init__()
        self._name = NAME

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return DEVICE

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return str(DEVICE)

    def device_count(self) -> int:
        return 1

    def synchronize(self, device_index: int | None = None) -> None:
        module.synchronize()

    @property
    def Stream(self) -> Any:
        return module.Stream

    @property
    def Event(self) -> Any:
        return module.Event

    def stream(self, stream: Any) -> Any:
        return module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        return module.current_stream()

    def default_stream(self, device_index: int | None = None) -> Any:
        return module.default_stream()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    def pin_memory(self, tensor: Any, make_copy: bool = True, match_shape: bool = True) -> Any:
        return tensor.pin_memory()

    def _torch_pin_memory(self, tensor: Any) -> Any:
        return tensor.pin_memory()

    def _torch_empty_pinned(self, tensor: Any, shape: Any) -> Any:
        return torch.empty(shape, dtype=tensor.dtype, pin_memory=True)

    def is_pinned(self, tensor: Any) -> bool:
        return tensor.is_pinned()

    def on_accelerator(self, tensor: Any) -> bool:
        return isinstance(tensor, SimulatedTensor)


def use(device: torch.device) -> None:
    """Make the simulated device, or the CPU, DeepSpeed's accelerator of this process."""
    set_accelerator(CPU_Accelerator() if device.type == "cpu" else SimulatedAccelerator())
