"""The job's rendezvous store: joining it, the check that it belongs to this job, and the failures that ranks report.

A rank that ends with an error records it here before it exits, so that the ranks that lose it can name it. Rank 0
hosts the store (under torchrun, its agent does).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch.distributed as dist

from maestro_scale.errors import MaestroError
from maestro_scale.training.binding import Launch

EXIT_HANG = 3  # exit code: a rank hung or died
_POLL_S = 0.1
_FOREIGN_S = 10.0  # the server of this job answers within milliseconds
_INTERRUPT_S = 10.0  # less than the 30 s after which torchrun and deepspeed follow up SIGTERM with SIGKILL
_TOKEN, _COUNT, _LEFT = "maestro/job", "maestro/failures", "maestro/left"

T = TypeVar("T")


class RendezvousError(MaestroError):
    """The ranks cannot meet: the port is in use, or some never joined; the message says what to do."""


class LostRankError(MaestroError):
    """Another rank has ended; the message names it. ``exit_code``: that of the rank that failed first."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Failure:
    """Why a rank ends. ``kind``: error (it prints ``text`` in one line), bug (it prints a traceback), or lost
    (``text``: which rank it lost). ``exit_code``: of the process."""

    rank: int
    host: str
    kind: Literal["error", "bug", "lost"]
    text: str
    exit_code: int

    def seen_by_others(self) -> LostRankError:
        """The error of the ranks that lose this one."""
        if self.kind == "lost":
            return LostRankError(self.text, self.exit_code)
        message = "its own error message" if self.kind == "error" else "an unexpected error and its traceback"
        return LostRankError(
            f"lost rank {self.rank} on {self.host}, which ended with {message} (exit code {self.exit_code})",
            self.exit_code,
        )


class JobStore:
    """The failures in a store. Every request is answered at once, except where the server's process is frozen.

    ``hosts``: whether the server is in this process, so that the store ends with it.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, hosts: bool) -> None:
        self.store, self.rank, self.size, self.hosts = store, rank, size, hosts

    def report(self, failure: Failure) -> None:
        """Record that this rank ends."""
        self.store.set(f"maestro/failure/{self.store.add(_COUNT, 1)}", json.dumps(asdict(failure)))

    def failures(self) -> list[Failure]:
        """Every recorded failure, in order."""
        keys = [f"maestro/failure/{n}" for n in range(1, self.store.add(_COUNT, 0) + 1)]
        # A number is taken before its failure is written: the last ones may be missing for a moment.
        return [Failure(**json.loads(self.store.get(key))) for key in keys if self.store.check([key])]

    def leave(self, wait_s: float, num_lost: int = 0) -> None:
        """Record that this rank has read what it needs, and wait up to ``wait_s`` until all but the lost ones have."""
        self.store.add(_LEFT, 1)
        deadline = time.monotonic() + wait_s
        while self.store.add(_LEFT, 0) < self.size - num_lost and time.monotonic() < deadline:
            time.sleep(_POLL_S)


_current: JobStore | None = None


def current() -> JobStore | None:
    """The store that this process has joined."""
    return _current


def within(seconds: float, request: Callable[[], T]) -> T | None:
    """``request()``, or None if it fails or takes longer: a request to a server in a frozen process never returns."""
    found: list[T] = []

    def run() -> None:
        try:
            found.append(request())
        except (RuntimeError, OSError, ValueError):
            return

    thread = threading.Thread(target=run, daemon=True, name="maestro-request")
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def join(launch: Launch, timeout_s: float, interrupted: Callable[[], str | None] = lambda: None) -> JobStore:
    """Connect to the store of this job, or start it, within ``timeout_s``.

    ``interrupted``: the reason to give up soon, if there is one. Raises RendezvousError where the port is in use by
    another program, or rank 0 does not start.
    """
    global _current
    address, port = _address()
    hosts = launch.rank == 0 and not has_agent_store()
    if hosts:
        store = _start_server(address, port, launch.size, timeout_s)
    else:
        _wait_for(
            lambda: _accepts(address, port),
            timeout_s,
            interrupted,
            f"rank 0 did not start within {timeout_s:g} s: {address}:{port} accepts no connection; see its log",
        )
        store = _connect(address, port, launch.size, timeout_s)
    token = job_token(os.environ, launch)
    if launch.rank == 0:
        store.set(_TOKEN, token)
    _wait_for(
        lambda: store.check([_TOKEN]),
        timeout_s if has_agent_store() else _FOREIGN_S,
        interrupted,
        _in_use(address, port),
    )
    # Before anything is written: it may be the store of another job.
    if store.get(_TOKEN).decode() != token or store.add(f"maestro/joined/{launch.rank}", 1) > 1:
        raise _in_use_error(address, port)
    _current = JobStore(store, launch.rank, launch.size, hosts)
    return _current


def wait_for_ranks(
    job: JobStore,
    prefix: str,
    timeout_s: float,
    interrupted: Callable[[], str | None] = lambda: None,
) -> None:
    """Wait until every rank has set ``<prefix>/<rank>``.

    Raises RendezvousError that names the ranks that did not, and LostRankError where one reports a failure.
    """
    missing = list(range(job.size))

    def complete() -> bool:
        missing[:] = [rank for rank in missing if not job.store.check([f"{prefix}/{rank}"])]
        if missing and (failures := [f for f in job.failures() if f.rank != job.rank]):
            raise failures[0].seen_by_others()
        return not missing

    def absent() -> str:
        names = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        return (
            f"rank{'s' * (len(missing) > 1)} {names} of {job.size} did not join within {timeout_s:g} s: "
            "see their logs; every rank needs the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
        )

    _wait_for(complete, timeout_s, interrupted, absent)


def wait_for_key(
    job: JobStore, key: str, timeout_s: float, interrupted: Callable[[], str | None] = lambda: None
) -> str:
    """The value of ``key``, set by another rank. Raises as ``wait_for_ranks``."""

    def complete() -> bool:
        if job.store.check([key]):
            return True
        if failures := [f for f in job.failures() if f.rank != job.rank]:
            raise failures[0].seen_by_others()
        return False

    _wait_for(complete, timeout_s, interrupted, f"rank 0 did not answer within {timeout_s:g} s; see its log")
    return job.store.get(key).decode()


def job_token(env: Mapping[str, str], launch: Launch) -> str:
    """A text that is equal on all ranks of a job and differs between jobs, as far as the launcher's variables tell."""
    names: tuple[str, ...] = ()
    if launch.launcher == "srun":
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    elif launch.launcher == "torchrun":
        names = ("TORCHELASTIC_RUN_ID",)
    parts = [launch.launcher, str(launch.size), *(env.get(name, "") for name in names)]
    if launch.launcher == "deepspeed" and launch.local_size == launch.size:
        parts.append(str(os.getppid()))  # on one node all ranks are children of one process
    return "/".join(parts)


def _address() -> tuple[str, int]:
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise RendezvousError(f"MASTER_PORT={port!r} is not a port: use a number from 1 to 65535")
    return os.environ["MASTER_ADDR"], int(port)


def has_agent_store() -> bool:
    """Whether torchrun's agent hosts the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _in_use(address: str, port: int) -> str:
    return (
        f"port {port} on {address} is in use by another program: choose a free one "
        "(deepspeed --master_port=N, torchrun --master-port=N, MAESTRO_PORT for the SLURM scripts, else MASTER_PORT)"
    )


def _in_use_error(address: str, port: int) -> RendezvousError:
    error = RendezvousError(_in_use(address, port))
    launch = Launch.from_env(os.environ)
    error.same_on_all_ranks = (
        launch.local_size == launch.size
    )  # on one node rank 0 finds it too, and reports it
    return error


def _start_server(address: str, port: int, size: int, timeout_s: float) -> dist.Store:
    try:
        # multi_tenant: the process group of this process connects to the same server.
        return dist.TCPStore(
            address,
            port,
            size,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise _in_use_error(address, port) from None
        raise RendezvousError(
            f"rank 0 cannot listen at {address}:{port}: {str(error).splitlines()[0]}"
        ) from None


def _connect(address: str, port: int, size: int, timeout_s: float) -> dist.Store:
    def connect() -> dist.Store:
        return dist.TCPStore(
            address,
            port,
            size,
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )

    # TCPStore waits without a limit for a server that accepts connections and never answers.
    store = within(_FOREIGN_S, connect)
    if store is None:
        raise _in_use_error(address, port)
    return store


def _accepts(address: str, port: int) -> bool:
    # By a plain socket: TCPStore logs several lines for each attempt that fails.
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def _wait_for(
    done: Callable[[], bool],
    timeout_s: float,
    interrupted: Callable[[], str | None],
    otherwise: str | Callable[[], str],
) -> None:
    """Poll ``done``. RendezvousError after ``timeout_s``, or some seconds after ``interrupted()`` gives a reason."""
    deadline = time.monotonic() + timeout_s
    reason: str | None = None
    while not done():
        now = time.monotonic()
        if reason is None and (reason := interrupted()) is not None:
            deadline = min(deadline, now + _INTERRUPT_S)
        if now > deadline:
            if reason is not None:
                raise RendezvousError(f"stopped by {reason} before all ranks had joined")
            raise RendezvousError(otherwise if isinstance(otherwise, str) else otherwise())
        time.sleep(_POLL_S)
