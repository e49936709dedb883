"""End child processes when their parent is killed: a parent-death signal, and a guard for servers with workers.

A killed process cannot clean up, and its children become orphans: a server keeps its port, a launcher its ranks.

- :func:`end_with_parent` is for one process. Linux only; elsewhere it does nothing.
- :func:`request_signal` is what a process can do that its parent did not start in this way.
- :func:`guarded` is for a server that starts workers, which would survive it: the guard is the leader of a process
  group, and ends the whole group once its standard input closes, which the kernel does when the parent ends.

The guard runs this file as a script, so the module imports only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.2
_SHUTDOWN_TIMEOUT_S = 5.0  # between SIGTERM and SIGKILL


def end_with_parent(signal_number: int = signal.SIGTERM) -> Callable[[], None]:
    """A ``preexec_fn`` for ``Popen``: the child gets ``signal_number`` when its parent ends, however it ends.

    The signal is kept by ``exec`` but not inherited by the child's own children. It is sent when the *thread* that
    started the child ends, so call ``Popen`` on a thread that lives as long as the process.
    """
    parent = os.getpid()
    prctl = _prctl()  # before the fork: a child of a process with threads must not load libraries

    def set_signal() -> None:
        if prctl is None:
            return
        prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal_number)

    return set_signal


def request_signal(signal_number: int) -> None:
    """Let the kernel send ``signal_number`` to this process when the thread that started it ends; Linux only."""
    if (prctl := _prctl()) is not None:
        prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def guarded(command: Sequence[str]) -> list[str]:
    """The command of a guard that runs ``command`` and ends it, with all of its workers, when this process ends.

    Start it with ``Popen(..., stdin=subprocess.PIPE, start_new_session=True)`` and keep the pipe open. Its exit code
    is that of ``command``. SIGTERM stops the group.
    """
    # Isolated: the environment of the server must not change what the guard imports.
    return [sys.executable, "-I", os.path.abspath(__file__), *command]


def _prctl() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return None


def _run_guard(command: Sequence[str]) -> int:
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # it must never end the group of its parent
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    # The signal covers a guard that is killed itself.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent(signal.SIGKILL))
    while child.poll() is None:
        if stops or select.select([sys.stdin.fileno()], [], [], _POLL_S)[0]:
            _end_group(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end_group(child: subprocess.Popen[bytes]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    os.killpg(0, signal.SIGKILL)  # workers that are left, and the guard


if __name__ == "__main__":
    sys.exit(_run_guard(sys.argv[1:]))
