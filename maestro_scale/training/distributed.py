"""Rank discovery and the collectives of the training. One rank alone uses the same code path as many."""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_PORTS = range(10_000, 30_000)  # Linux gives outgoing connections 32768 and above


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, ``local_rank`` on its node, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = (
        None  # a CPU group for flags and clocks, so that they cost no device synchronisation
    )

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


def init_distributed(timeout_s: float = 600.0) -> World:
    """Join the process group that the launcher describes (RANK …, else SLURM's variables, else one process alone)."""
    rank, size, local_rank = rank_from_env()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    import deepspeed

    device = (
        torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1)) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    else:
        # Its shared-memory collectives need a compiler and a minute on first use, and only bring something where
        # CPUs train for real.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if cuda else None
    return World(rank, size, local_rank, device, control)


def destroy_process_group() -> None:
    """Destroy the process group, so that the launcher sees a clean exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def hard_exit(code: int) -> NoReturn:
    """Exit now: flush logs and run finalizers, but skip the interpreter's shutdown.

    Threads of Gloo and TCPStore that are still in C++ would abort it, and a finished run would look like a failed one.
    """
    multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # private: not in typeshed
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank_from_env(env: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, world size, local rank). Explicit variables win over SLURM's, which are only there under srun."""
    if "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


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
