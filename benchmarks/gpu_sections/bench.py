"""What a section receives: the device, the options of the benchmark, its record, and the process group."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.gpu_sections.device import Device
from benchmarks.gpu_sections.record import Record
from maestro_scale.training.distributed import World, init_distributed


@dataclass
class Bench:
    """The context of a section. ``work``: a folder that the sections of one benchmark share."""

    rehearse: bool
    work: Path
    record: Record
    device: Device

    @cached_property
    def world(self) -> World:
        """The process group of this process; joined at first use."""
        return init_distributed(device="cpu" if self.rehearse else "auto")

    def pick(self, full: int, rehearsal: int) -> int:
        """A size: ``full`` on a GPU, ``rehearsal`` on a CPU."""
        return rehearsal if self.rehearse else full

    def free(self) -> None:
        """Release the memory of what was deleted, and begin to measure the peak."""
        gc.collect()
        self.device.start_peak()
