"""CPU affinity: the CPUs of the NUMA node that a PCI device is attached to, read from sysfs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def parse_cpu_list(text: str) -> frozenset[int]:
    """Linux's notation of CPUs: ``0-3,8`` is 0, 1, 2, 3 and 8."""
    ranges = [part.split("-") for part in text.strip().split(",") if part.strip()]
    return frozenset(cpu for r in ranges for cpu in range(int(r[0]), int(r[-1]) + 1))


def cpus_near(pci_id: str, sysfs: Path = Path("/sys")) -> frozenset[int]:
    """CPUs of the NUMA node of a PCI device (``0000:3b:00.0``); empty where the kernel does not know it."""
    device = sysfs / "bus" / "pci" / "devices" / pci_id.lower()
    with suppress(OSError, ValueError):
        if cpus := parse_cpu_list((device / "local_cpulist").read_text()):
            return cpus
    with suppress(OSError, ValueError):
        node = int((device / "numa_node").read_text())  # -1: not known
        return parse_cpu_list((sysfs / "devices" / "system" / "node" / f"node{node}" / "cpulist").read_text())
    return frozenset()


def choose_cpus(
    allowed: frozenset[int], near: frozenset[int], others: Sequence[frozenset[int]], num_online: int
) -> frozenset[int] | None:
    """The CPUs to restrict a rank to, a part of ``allowed``; None: leave them as they are.

    ``others``: the CPUs that each other rank of this node may use; ``num_online``: CPUs of the machine. Where the
    scheduler has divided the CPUs among the ranks, a second restriction would leave a rank fewer than it was given.
    """
    is_divided = any(cpus != allowed for cpus in others) if others else len(allowed) < num_online
    chosen = allowed & near
    return None if is_divided or not chosen or chosen == allowed else chosen


def restrict_process(cpus: frozenset[int]) -> None:
    """Restrict all threads of this process; those that it starts later, and its child processes, inherit it."""
    for thread in os.listdir(
        "/proc/self/task"
    ):  # an affinity belongs to a thread, and numpy has started some
        with suppress(OSError):  # the thread has ended
            os.sched_setaffinity(int(thread), cpus)
