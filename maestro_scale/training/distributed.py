"""Rank discovery and the collectives of the training. One rank alone uses the same code path as many."""

from __future__ import annotations

import json
import logging
import multiprocessing.util
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from maestro_scale.training.affinity import choose_cpus, cpus_near, restrict_process
from maestro_scale.training.binding import DeviceError, Launch, check_distinct
from maestro_scale.training.deepspeed_import import import_deepspeed
from maestro_scale.training.device import DeviceSetting, bind_process, gpu_id, pci_id, use_device
from maestro_scale.training.job_store import (
    JobStore,
    RendezvousError,
    has_agent_store,
    join,
    wait_for_key,
    wait_for_ranks,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
# Until all ranks have started: nodes may differ by minutes where they import from a shared disk.
_JOIN_S = 600.0
_PORTS = range(10_000, 30_000)  # Linux gives outgoing connections 32768 and above


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, ``local_rank`` on its node, and the device it computes on.

    ``control``: a CPU group for flags and clocks, so that they cost no device synchronisation. ``launcher``: see
    ``binding.Launch``.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    launcher: str = "none"
    num_nodes: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes logs and pictures."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's tensor, on every rank; the argument is left alone."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def sum_with_flags(self, values: Tensor, flags: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """As ``sum``, of ``values`` (N,), and whether each flag is set on any rank, (F,) bool, in one collective.
        Both stay on the device of ``values``."""
        raised = values.new_zeros(len(flags))
        for i, flag in enumerate(flags):
            if flag:  # by a kernel: a tensor of the list would be a copy from pageable memory, for which the host waits
                raised[i].fill_(1)
        total = self.sum(torch.cat([values, raised]))
        return total[: len(values)], total[len(values) :] > 0

    def maxima(self, values: Sequence[float]) -> list[float]:
        """The largest over all ranks of each number."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over all ranks of each number."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank gets the same answer."""
        return self.maxima([float(flag)])[0] > 0

    def gather(self, value: str | None) -> list[str | None]:
        """The text of every rank, in order of rank; every rank gets the same answer."""
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, value, group=self.control)
        return texts

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank; it must pickle."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def sum_on_host(self, values: np.ndarray) -> np.ndarray:
        """The sum of every rank's array, on every rank, by the CPU's network."""
        total = torch.from_numpy(values.copy())
        dist.all_reduce(total, group=self.control)
        return total.numpy()

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.control)


def init_distributed(
    timeout_s: float = 600.0,
    device: DeviceSetting = "auto",
    interrupted: Callable[[], str | None] = lambda: None,
) -> World:
    """Join the process group that the launcher describes, with the device of this rank; ``device``: ``train.device``.

    ``timeout_s``: of a collective. ``interrupted``: why not to wait for ranks that have not joined, if that is so.

    Raises:
        DeviceError: the run would leave GPUs unused or share one, or the launcher's variables are incomplete.
        RendezvousError: the port is in use, or a rank does not join.
        LostRankError: another rank has failed.
    """
    binding = bind_process(device)
    launch = binding.launch
    os.environ.update(binding.exports)
    if launch.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    elif missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise DeviceError(
            f"{launch.size} ranks, but {' and '.join(missing)} not set: export the address of rank 0's node and a free "
            "port, or start with slurm/pretrain_multinode.sh, torchrun or deepspeed"
        )
    cuda = binding.index is not None
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    deepspeed = import_deepspeed()

    if not cuda:
        # Its shared-memory collectives need a compiler and a minute on first use, and only bring something where
        # CPUs train for real.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    own = use_device(binding)
    # The process group connects to the same server, which lives as long as this store.
    job = _join(launch, interrupted)
    hosts = _compare_nodes(job, launch, own, interrupted)
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if cuda else None
    return World(launch.rank, launch.size, launch.local_rank, own, control, launch.launcher, len(set(hosts)))


def _join(launch: Launch, interrupted: Callable[[], str | None]) -> JobStore:
    try:
        return join(launch, _JOIN_S, interrupted)
    except RendezvousError:
        if launch.size > 1 or has_agent_store():
            raise
    # A rank that is alone needs no port that others know. The deepspeed launcher gives 29500 to every job of a node.
    log.info("port %s is in use: another one is used", os.environ["MASTER_PORT"])
    os.environ["MASTER_PORT"] = str(free_port())
    return join(launch, _JOIN_S, interrupted)


def _compare_nodes(
    job: JobStore, launch: Launch, device: torch.device, interrupted: Callable[[], str | None]
) -> list[str]:
    """The host of every rank, after the check for shared GPUs and the CPU affinity, which need the others' devices.

    Before the process group: NCCL refuses a shared GPU too, when it connects, without saying what to change.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    own = json.dumps([socket.gethostname(), gpu_id(device), sorted(allowed)])
    places = [json.loads(place) for place in _exchange(job, own, interrupted)]
    hosts = [host for host, _, _ in places]
    check_distinct([gpu for _, gpu, _ in places], hosts)
    if (address := pci_id(device)) is not None:
        others = [
            frozenset(cpus)
            for rank, (host, _, cpus) in enumerate(places)
            if host == hosts[launch.rank] and rank != launch.rank
        ]
        if cpus := choose_cpus(allowed, cpus_near(address), others, os.cpu_count() or 1):
            restrict_process(cpus)
            log.info(
                "rank %d: %d of %d CPUs, next to its GPU %s", launch.rank, len(cpus), len(allowed), address
            )
    return hosts


def _exchange(job: JobStore, text: str, interrupted: Callable[[], str | None]) -> list[str]:
    """The text of every rank. Rank 0 collects them: the server answers few requests per rank, not one per pair."""
    store = job.store
    store.set(f"maestro/text/{job.rank}", text)
    if job.rank == 0:
        wait_for_ranks(job, "maestro/text", _JOIN_S, interrupted)
        texts = [store.get(f"maestro/text/{r}").decode() for r in range(job.size)]
        store.set("maestro/texts", json.dumps(texts))
    texts = json.loads(wait_for_key(job, "maestro/texts", _JOIN_S, interrupted))
    store.set(f"maestro/read/{job.rank}", "")
    if job.rank == 0:  # the server may be in this process: should it end now, the others could not read
        wait_for_ranks(job, "maestro/read", _JOIN_S, interrupted)
    return texts


def exchange_texts(launch: Launch, text: str, timeout_s: float = _JOIN_S) -> list[str]:
    """The text of every rank, in order of rank, for a command whose ranks otherwise work independently.

    RendezvousError if the other ranks do not join in time, LostRankError if one of them has failed.
    """
    return _exchange(join(launch, timeout_s), text, lambda: None)


def destroy_process_group() -> None:
    """Destroy the process group, so that the launcher sees a clean exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def hard_exit(code: int) -> NoReturn:
    """Exit now: flush logs and run finalizers, but skip the interpreter's shutdown.

    Threads of Gloo and TCPStore that are still in C++ would abort it, and a finished run would look like a failed one.
    """
    multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # private: not in typeshed
    # The folder of the fork server's socket: its finalizer has a negative priority, like those that join the threads
    # of queues, which can block forever.
    if folder := multiprocessing.current_process()._config.get("tempdir"):  # type: ignore[attr-defined]  # private
        shutil.rmtree(folder, ignore_errors=True)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """A free TCP port, outside of the range that Linux gives to outgoing connections.

    Raises:
        OSError: of 100 ports drawn at random, all are in use.
    """
    for port in random.SystemRandom().sample(_PORTS, k=100):
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port
    raise OSError(
        f"100 ports from {_PORTS.start} to {_PORTS.stop} are all in use: name a free one in MASTER_PORT"
    )
