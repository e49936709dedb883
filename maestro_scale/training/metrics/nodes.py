"""Utilisation of every node of a run between two log lines: CPU, memory, network, GPUs."""

from __future__ import annotations

import socket
import time

import psutil
import torch

from maestro_scale.training.distributed import World

_NAMES = ("cpu_percent", "memory_gib", "network_mb_per_s", "gpu_memory_gib", "gpu_percent")


class Nodes:
    """The nodes of a run, by host name; the first rank of each measures."""

    def __init__(self, world: World) -> None:
        self._world = world
        hosts = world.gather(socket.gethostname())
        self.hosts = tuple(dict.fromkeys(hosts))
        host = hosts[world.rank]
        self._mine = self.hosts.index(host) if hosts.index(host) == world.rank else None
        self._then_s, self._received = time.monotonic(), _received()
        psutil.cpu_percent()  # the next call measures the time since this one

    def read(self) -> dict[str, float]:
        """``system/<host>/<what>`` since the last call; all ranks must call it. GPU figures only where there are GPUs.

        ``cpu_percent``: of all processors; ``memory_gib``: in use by all programs; ``network_mb_per_s``: received;
        ``gpu_memory_gib``: the most in use on one GPU; ``gpu_percent``: mean share of time that kernels ran.
        """
        values = [0.0] * (len(self.hosts) * len(_NAMES))
        if self._mine is not None:
            start = self._mine * len(_NAMES)
            values[start : start + len(_NAMES)] = self._measure()
        values = self._world.sums(values)
        names = _NAMES if self._world.device.type == "cuda" else _NAMES[:3]
        return {
            f"system/{host}/{name}": values[i * len(_NAMES) + k]
            for i, host in enumerate(self.hosts)
            for k, name in enumerate(names)
        }

    def _measure(self) -> list[float]:
        now_s, received = time.monotonic(), _received()
        rate = (received - self._received) / max(now_s - self._then_s, 1e-9) / 1e6
        self._then_s, self._received = now_s, received
        memory = psutil.virtual_memory()
        return [psutil.cpu_percent(), (memory.total - memory.available) / 2**30, rate, *_gpus()]


def _received() -> int:
    return psutil.net_io_counters().bytes_recv


def _gpus() -> tuple[float, float]:
    if not torch.cuda.is_available():
        return 0.0, 0.0
    used, busy = [], []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        used.append((total - free) / 2**30)
        try:
            busy.append(float(torch.cuda.utilization(i)))
        except (ImportError, RuntimeError):  # no pynvml, or a virtual GPU without utilisation counters
            busy.append(0.0)
    return max(used), sum(busy) / len(busy)
