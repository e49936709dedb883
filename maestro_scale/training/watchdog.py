"""Watchdog: ends a job that hangs and names the rank that it waits for, by heartbeat and monitor threads on every rank.

The heartbeat thread writes the rank's progress into the rendezvous store. If the main thread makes no progress for
``timeout_s``, the monitor thread compares the heartbeats of all ranks: a rank without new heartbeats is frozen or dead;
otherwise the others wait for the rank that is furthest behind. The store is a server in rank 0: if that process is
frozen, a request to it never returns, so requests are made in daemon threads that are joined with a timeout.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from maestro_scale.training.distributed import World

EXIT_HANG = 3  # exit code
_MAX_INTERVAL_S = 5.0
_NO_HEARTBEAT = "no heartbeat from"
# What a rank is doing, in the order within a step.
_ORDER = ("starting", "waiting for data", "computing", "evaluating", "writing", "ending")


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a rank: the ``count``-th, at ``step`` (the current one); ``doing`` is one of ``_ORDER``."""

    rank: int
    host: str
    count: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, last at step {self.step}, {self.doing}"

    @property
    def progress(self) -> tuple[int, int]:
        """Increases with the progress of the rank."""
        return self.step, _ORDER.index(self.doing)


def find_stalled(before: list[Heartbeat | None], after: list[Heartbeat | None]) -> str:
    """Which ranks the job waits for, from heartbeats read twice, at least one interval apart."""
    silent = [
        f"rank {rank}, which never sent one" if a is None else str(a)
        for rank, (b, a) in enumerate(zip(before, after, strict=True))
        if a is None or (b is not None and b.count == a.count)
    ]
    if silent:
        return f"{_NO_HEARTBEAT} {'; '.join(silent)} (frozen, dead or disconnected)"
    alive = [a for a in after if a is not None]
    least = min(a.progress for a in alive)
    behind = [a for a in alive if a.progress == least]
    if len(behind) == len(alive):
        return f"all {len(alive)} ranks are at step {behind[0].step}, {behind[0].doing}"
    return f"the others wait for {'; '.join(map(str, behind))}"


class Watchdog:
    """Runs between ``start`` and ``stop``. The main thread reports its progress with ``note``."""

    def __init__(self, world: World, timeout_s: float, run_dir: Path) -> None:
        self._world, self._timeout_s, self._dir = world, timeout_s, run_dir / "hang"
        self._interval_s = min(_MAX_INTERVAL_S, timeout_s / 8)
        self._noted, self._since = (0, _ORDER[0]), time.monotonic()
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(
            target=self._send_heartbeats, daemon=True, name="maestro-heartbeat"
        )
        self._monitor = threading.Thread(target=self._watch, daemon=True, name="maestro-watchdog")
        self._count = 0
        # A separate connection: that of the process group may be blocked in a wait.
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(4 * self._interval_s, 2)),
        )

    def start(self) -> Watchdog:
        """Start both threads."""
        self._send_heartbeat()
        self._heartbeat.start()
        self._monitor.start()
        return self

    def stop(self) -> None:
        """End both threads."""
        self._ended.set()
        for thread in (self._heartbeat, self._monitor):
            thread.join(4 * self._interval_s)

    def note(self, step: int, doing: str, extra_s: float = 0.0) -> None:
        """Record progress: the main thread is at ``step``; ``doing`` is one of ``_ORDER``.

        ``extra_s``: how much longer than ``timeout_s`` the next note may take.
        """
        self._noted, self._since = (step, doing), time.monotonic() + extra_s

    def missing(self) -> str | None:
        """After a failed collective: a message that names the ranks without heartbeat, or None; a few intervals."""
        found = self._diagnose()
        return found if found.startswith(_NO_HEARTBEAT) else None

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._send_heartbeat()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            if time.monotonic() - self._since > self._timeout_s:
                self._end()

    def _send_heartbeat(self) -> None:
        self._count += 1
        beat = {"host": socket.gethostname(), "count": self._count, "step": self._noted[0]}
        with contextlib.suppress(RuntimeError, OSError):  # the store ended with rank 0; _diagnose reports it
            self._store.set(_key(self._world.rank), json.dumps({**beat, "doing": self._noted[1]}))

    def _diagnose(self) -> str:
        found: list[str] = []
        # In a thread with a timeout: a request to a store in a frozen process never returns.
        request = threading.Thread(target=lambda: found.append(self._compare_heartbeats()), daemon=True)
        request.start()
        request.join(8 * self._interval_s)
        return found[0] if found else self._no_store()

    def _compare_heartbeats(self) -> str:
        try:
            before = self._heartbeats()
            time.sleep(3 * self._interval_s)
            return find_stalled(before, self._heartbeats())
        except (RuntimeError, OSError):
            return self._no_store()

    def _no_store(self) -> str:
        return f"{_NO_HEARTBEAT} rank 0 on {os.environ['MASTER_ADDR']}, which runs the store of the process group"

    def _heartbeats(self) -> list[Heartbeat | None]:
        beats: list[Heartbeat | None] = []
        for rank in range(self._world.size):
            known = self._store.check([_key(rank)])
            beats.append(Heartbeat(rank, **json.loads(self._store.get(_key(rank)))) if known else None)
        return beats

    def _end(self) -> None:
        stack = self._dir / f"rank{self._world.rank:05d}.txt"
        try:
            stack.parent.mkdir(parents=True, exist_ok=True)
            with stack.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        step, doing = self._noted
        print(
            f"error: rank {self._world.rank} made no progress for {self._timeout_s:g} s at step {step}, {doing}: "
            f"{self._diagnose()}. Stack traces are in {self._dir}; the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        # No clean exit is possible: collectives do not return, and destructors wait for them.
        os._exit(EXIT_HANG)


@contextlib.contextmanager
def monitored(world: World, timeout_s: float, run_dir: Path) -> Iterator[Watchdog]:
    """Run a watchdog. If a collective fails because a rank died, name that rank and end this process."""
    watchdog = Watchdog(world, timeout_s, run_dir).start()
    try:
        yield watchdog
    except RuntimeError:
        if world.size > 1 and (missing := watchdog.missing()):
            traceback.print_exc()
            print(f"error (rank {world.rank}): {missing}", file=sys.stderr, flush=True)
            # Not sys.exit: destructors would wait for collectives that never end.
            os._exit(EXIT_HANG)
        raise
    finally:
        watchdog.stop()


def _key(rank: int) -> str:
    return f"maestro/beat/{rank}"
