"""Utilisation of every node of a run between two log lines: CPU, memory, network, GPUs."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Sequence

import psutil

from maestro_scale.training import nvml
from maestro_scale.training.device import gpu_id, used_memory_bytes
from maestro_scale.training.distributed import World

_HOST = ("cpu_percent", "memory_gib", "network_mb_per_s")
_GPU = ("gpu_memory_gib", "gpu_percent")


class Nodes:
    """The nodes of a run, by host name. The first rank of each measures the host, and every rank its own GPU."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._gpu = gpu_id(world.device)
        hosts = [host or "" for host in world.gather(socket.gethostname())]
        self.hosts = tuple(dict.fromkeys(hosts))
        self._index = self.hosts.index(hosts[world.rank])
        self._measures_host = hosts.index(hosts[world.rank]) == world.rank
        self._then_s, self._received = time.monotonic(), _received()
        psutil.cpu_percent()  # the next call measures the time since this one

    def read(self) -> dict[str, float]:
        """``system/<host>/<what>`` since the last call; all ranks must call it. What no rank can measure is left out.

        ``cpu_percent``: of all processors; ``memory_gib``: in use by all programs; ``network_mb_per_s``: received;
        ``gpu_memory_gib``: the most in use on one GPU of the run; ``gpu_percent``: mean share of time that kernels ran.
        """
        memory, busy = self._measure_gpu()
        host = self._measure_host() if self._measures_host else [0.0] * len(_HOST)
        # Of GPUs that report their utilisation, so that the mean is over these.
        sums = self._by_host(self._world.sums, [*host, busy or 0.0, float(busy is not None)], 0.0)
        maxima = self._by_host(self._world.maxima, [-math.inf if memory is None else memory], -math.inf)
        read: dict[str, float] = {}
        for name, (*of_host, total, count), (most,) in zip(self.hosts, sums, maxima, strict=True):
            gpu = [most if most > -math.inf else None, total / count if count else None]
            values = zip((*_HOST, *_GPU), (*of_host, *gpu), strict=True)
            read |= {f"system/{name}/{what}": value for what, value in values if value is not None}
        return read

    def _by_host(
        self, collective: Callable[[Sequence[float]], list[float]], own: Sequence[float], neutral: float
    ) -> list[list[float]]:
        """The collective of the ranks' ``own`` values, for each host over its ranks."""
        width = len(own)
        values = [neutral] * (width * len(self.hosts))
        values[self._index * width : (self._index + 1) * width] = own
        values = collective(values)
        return [values[i * width : (i + 1) * width] for i in range(len(self.hosts))]

    def _measure_host(self) -> list[float]:
        now_s, received = time.monotonic(), _received()
        rate = (received - self._received) / max(now_s - self._then_s, 1e-9) / 1e6
        self._then_s, self._received = now_s, received
        memory = psutil.virtual_memory()
        return [psutil.cpu_percent(), (memory.total - memory.available) / 2**30, rate]

    def _measure_gpu(self) -> tuple[float | None, float | None]:
        """(GiB in use, percent of the time that kernels ran) of this rank's GPU; None: not provided.

        Of the own GPU only: asking CUDA about another one would open a context there, of hundreds of MB.
        """
        used = nvml.used_bytes(self._gpu) if self._gpu else None
        if used is None:
            used = used_memory_bytes(self._world.device)
        return None if used is None else used / 2**30, nvml.utilization_percent(
            self._gpu
        ) if self._gpu else None


def _received() -> int:
    return psutil.net_io_counters().bytes_recv
