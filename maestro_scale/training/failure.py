"""The end of a rank that has failed: it tells the other ranks, and finds out which of them prints a common error."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from maestro_scale.training.binding import DeviceError, Launch
from maestro_scale.training.job_store import (
    Failure,
    JobStore,
    LostRankError,
    RendezvousError,
    current,
    join,
    within,
)
from maestro_scale.training.watchdog import LINGER_S

_OPEN_S = 5.0  # for the store, where this rank fails before it has joined
_OPEN_COMMON_S = 20.0  # the same, where rank 0 has probably failed too and will print the error
_NOTICE_S = 6.0  # until the other ranks have noticed that this one ends
_SAME_S = 1.0  # between the same error on two ranks


def end_rank(
    error: Exception, line: str | None, rank: int, exit_code: int, print_line: Callable[[], None]
) -> None:
    """Report a failure to the other ranks, and to the user unless a lower rank reports the same. Takes some seconds.

    ``line``: what ``print_line`` prints; None for a bug, which was printed with its traceback.
    """
    common = bool(getattr(error, "same_on_all_ranks", False))
    if threading.current_thread() is threading.main_thread():
        # The launcher ends the other ranks once one has ended. Rank 0 must outlive that: it hosts the store.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if rank == 0 else signal.SIG_DFL)
    job = current()
    if job is None:
        if common and rank == 0:  # e.g. a mistake in the recipe, which every rank finds before it joins
            return print_line()
        if isinstance(error, RendezvousError):
            return None if common else print_line()
        job = _open(_OPEN_COMMON_S if common else _OPEN_S)
        if job is None:
            return print_line()
    if isinstance(error, LostRankError):  # the other rank has reported it already
        print_line()
    else:
        text = line or f"{type(error).__name__}: {error}"
        failure = Failure(rank, socket.gethostname(), "error" if line else "bug", text, exit_code)
        if within(_SAME_S + 2, lambda: _report(job, failure)) is not False:
            print_line()
    # The launcher ends the others as soon as this rank has ended: they need a moment to say why.
    wait_s = LINGER_S if job.hosts else _NOTICE_S
    within(wait_s + 1, partial(job.leave, wait_s))
    return None


def _report(job: JobStore, failure: Failure) -> bool:
    """Whether no rank below this one reports the same."""
    job.report(failure)
    deadline = time.monotonic() + (_SAME_S if failure.rank else 0)
    while time.monotonic() < deadline:
        if any(f.rank < failure.rank and f.text == failure.text for f in job.failures()):
            return False
        time.sleep(_SAME_S / 10)
    return True


def _open(timeout_s: float) -> JobStore | None:
    """The store, for a rank that has not joined yet; None if it cannot be reached."""
    try:
        return join(Launch.from_env(os.environ), timeout_s)
    except (DeviceError, RendezvousError, RuntimeError, OSError, ValueError, KeyError):
        return None
