"""Ends a rank when its launcher has ended, and a worker process when the process that uses it has ended.

torchrun and the deepspeed launcher do not end their ranks when they are killed themselves. srun and mpirun do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from maestro_scale.parent_death import request_signal

_EXIT = 3  # as a rank that has lost another one
_POLL_S = 1.0
_GRACE_S = 60.0  # for the training loop to notice the request; longer than a step
_SIGNAL = signal.SIGUSR2  # not used otherwise


class Stoppable(Protocol):
    """A stop request that a training loop polls: ``training.stop.StopRequest``."""

    reason: str | None
    num_polls: int


def identity(pid: int) -> str | None:
    """``pid:start time`` of a running process, which no later process has; None if it has ended, or without /proc."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{pid}:{fields[18]}" if state not in "ZX" else None
    return None


def parent_of(pid: int) -> int:
    """Process id of the parent, 0 if there is none."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _command(pid: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def launchers(env: Mapping[str, str], parent: int) -> list[str]:
    """Identities of the processes whose end must end this rank, of which ``parent`` is the parent process.

    None without a launcher that is known to stay for as long as its ranks: a program under nohup, or a rank that a
    script starts in the background, outlives its shell.
    """
    pids = []
    if "RANK" in env and ("TORCHELASTIC_RUN_ID" in env or "CROSS_RANK" in env):  # set by torchrun, deepspeed
        pids.append(parent)
        # The `deepspeed` command starts one process per node that starts the ranks; it does not pass on its end.
        if "CROSS_RANK" in env and _is_deepspeed(parent_of(parent)):
            pids.append(parent_of(parent))
    return [name for pid in pids if (name := identity(pid)) is not None]


def watch_launcher(stop: Stoppable | None = None) -> None:
    """From now on, end this rank within seconds after its launcher has ended. Call it before threads are started.

    ``stop``: while a training loop polls it, it is asked to stop, so that the run saves a checkpoint as at SIGTERM.
    """
    parent = os.getppid()
    watched = launchers(os.environ, parent)
    if not watched:
        return
    if _is_orphan(parent):
        _leave("the end of its launcher")
    # Blocked in all threads, so that the watching thread receives it whatever the main thread does. Only a hint: the
    # kernel sends it when the *thread* that started this process ends, and it needs Linux.
    signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
    request_signal(_SIGNAL)
    threading.Thread(target=_watch, args=(watched, stop), daemon=True, name="maestro-launcher").start()


def exit_with_parent() -> None:
    """In a worker process of ``multiprocessing``: end it when the process that started it ends."""
    threading.Thread(target=_exit_with_parent, daemon=True, name="maestro-orphan").start()


def kill_workers() -> None:
    """Kill the worker processes that this process has started, before ``os._exit``, which does not end them.

    :func:`exit_with_parent` does not run in a worker that was stopped (SIGSTOP, a debugger).
    """
    for worker in multiprocessing.active_children():
        with suppress(OSError, ValueError, AttributeError):  # it has just ended
            worker.kill()


def _exit_with_parent() -> None:
    # The parent's process id does not tell it: the parent of a worker may be the fork server, which lives as long as
    # there are workers.
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _is_deepspeed(pid: int) -> bool:
    names = {os.path.basename(word) for word in _command(pid)[:3]}
    return not names.isdisjoint({b"deepspeed", b"ds", b"deepspeed.launcher.runner"})


def _is_orphan(parent: int) -> bool:
    """Whether the launcher ended before this process looked: its parent is then the first process of the machine.
    In a container a launcher may be that process."""
    return parent == 1 and not any(b"python" in word or b"torchrun" in word for word in _command(1)[:2])


def _watch(watched: list[str], stop: Stoppable | None) -> None:
    while True:
        with suppress(OSError):
            signal.sigtimedwait({_SIGNAL}, _POLL_S)
        for name in watched:
            pid = int(name.partition(":")[0])
            if identity(pid) != name:
                _end(f"the end of its launcher (process {pid})", stop, _leave)


def _end(
    reason: str, stop: Stoppable | None, leave: Callable[[str], None], grace_s: float = _GRACE_S
) -> None:
    """Ask the training loop to stop, if there is one; ``leave`` where it does not notice that."""
    if stop is not None and stop.num_polls:
        polls = stop.num_polls
        stop.reason = stop.reason or reason
        deadline = time.monotonic() + grace_s
        while stop.num_polls == polls and time.monotonic() < deadline:
            time.sleep(_POLL_S / 10)
        if stop.num_polls > polls:
            # It saves a checkpoint and ends; the watchdog ends it if that hangs.
            threading.Event().wait()
    leave(reason)


def _leave(reason: str) -> None:
    with suppress(OSError, ValueError):  # the terminal may have ended with the launcher
        print(f"error: rank {os.environ.get('RANK', 0)} stopped by {reason}", file=sys.stderr, flush=True)
    kill_workers()
    os._exit(_EXIT)
