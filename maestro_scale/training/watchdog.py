"""Watchdog: ends a job that hangs or has lost a rank, and names that rank, by threads on every rank.

The heartbeat thread writes the rank's progress into the rendezvous store. If the main thread makes no progress for
``timeout_s``, the monitor thread compares the heartbeats of all ranks: a rank without new heartbeats is frozen or dead;
otherwise the others wait for the rank that is furthest behind. The peer thread reads what other ranks report before
they end: a collective of NCCL does not return when a rank is lost. The store is a server in rank 0: if that process is
frozen, a request to it never returns, so requests are made in daemon threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing.util
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from maestro_scale.launcher_death import kill_workers
from maestro_scale.training.distributed import World
from maestro_scale.training.job_store import EXIT_HANG, Failure, JobStore, LostRankError, within

_MAX_INTERVAL_S = 2.0
_PEER_POLL_S = 1.0
# Between another rank's report and the end of this one: its main thread may be about to raise the same error.
_GRACE_S = 3.0
LINGER_S = 15.0
"""How long rank 0 keeps the store for the others after it has failed: longer than they take to notice."""
_MAX_NAMED = 8
_NO_HEARTBEAT = "no heartbeat from"
# What a rank is doing, in the order within a step.
_ORDER = ("starting", "waiting for data", "computing", "evaluating", "writing", "ending", "ended")


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


def find_silent(before: list[Heartbeat | None], after: list[Heartbeat | None]) -> list[int]:
    """The ranks without a new heartbeat, of those that have not finished."""
    return [
        rank
        for rank, (b, a) in enumerate(zip(before, after, strict=True))
        if a is None or (b is not None and b.count == a.count and a.doing != _ORDER[-1])
    ]


def find_stalled(before: list[Heartbeat | None], after: list[Heartbeat | None]) -> str:
    """Which ranks the job waits for, from heartbeats read twice, at least one interval apart."""
    if silent := find_silent(before, after):
        names = [str(after[rank] or f"rank {rank}, which never sent one") for rank in silent[:_MAX_NAMED]] + [
            "…"
        ] * (len(silent) > _MAX_NAMED)
        return f"{_NO_HEARTBEAT} {'; '.join(names)} (frozen, dead or disconnected)"
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
        self._threads = [
            threading.Thread(target=target, daemon=True, name=f"maestro-{name}")
            for target, name in (
                (self._send_heartbeats, "heartbeat"),
                (self._watch, "watchdog"),
                (self._follow_peers, "peers"),
            )
        ]
        self._count = 0
        self._num_silent = (
            0  # ranks that were found without heartbeat: they will not read that this rank ends
        )
        # A separate connection: that of the process group may be blocked in a wait.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(4 * self._interval_s, 2)),
        )
        self._job = JobStore(store, world.rank, world.size, hosts=world.rank == 0)
        self._lost: LostRankError | None = None  # what the peer thread found, and when
        self._lost_at = 0.0
        self._answered_at = time.monotonic()  # when the store last answered
        self._changed_at: dict[
            int, tuple[int, float]
        ] = {}  # by rank: count of its last heartbeat, and when it changed

    def start(self) -> Watchdog:
        """Start the threads."""
        self._send_heartbeat()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End the threads."""
        self._ended.set()
        for thread in self._threads:
            thread.join(4 * self._interval_s)
        self._noted = (self._noted[0], _ORDER[-1])
        within(2 * self._interval_s, self._send_heartbeat)  # else the others would take this rank for dead

    def note(self, step: int, doing: str, extra_s: float = 0.0) -> None:
        """Record progress: the main thread is at ``step``; ``doing`` is one of ``_ORDER``.

        ``extra_s``: how much longer than ``timeout_s`` the next note may take.
        """
        self._noted, self._since = (step, doing), time.monotonic() + extra_s

    def pause(self, doing: str = "evaluating") -> None:
        """Until the next note, heartbeats count as progress: the main thread does something of any length, such as
        fitting a classifier, or waits for a rank that does."""
        self.note(self._noted[0], doing, extra_s=float("inf"))

    def write_stacks_to(self, run_dir: Path) -> None:
        """From now on, stack traces of a hang go to ``hang/`` in ``run_dir``."""
        self._dir = run_dir / "hang"

    @property
    def _paused(self) -> bool:
        return self._since == float("inf")

    def find_lost(self) -> LostRankError | None:
        """After a failed collective: the rank that was lost, as it or another rank reports it, or the ranks without
        heartbeat, found within a few intervals; None: no rank is missing."""
        deadline = time.monotonic() + 2 * _PEER_POLL_S  # a rank reports before its connections close
        while time.monotonic() < deadline and self._job_answers():
            if failures := within(2 * self._interval_s, self._failures):
                return failures[0].seen_by_others()
            time.sleep(_PEER_POLL_S / 4)
        found = self._diagnose()
        if failures := within(2 * self._interval_s, self._failures):  # another survivor was faster
            return failures[0].seen_by_others()
        return LostRankError(f"lost a rank: {found}", EXIT_HANG) if found.startswith(_NO_HEARTBEAT) else None

    def _failures(self) -> list[Failure]:
        return [f for f in self._job.failures() if f.rank != self._world.rank]

    def _job_answers(self) -> bool:
        return within(2 * self._interval_s, lambda: self._job.store.check([_key(0)]) or True) is not None

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._send_heartbeat()

    def _follow_peers(self) -> None:
        """Read the failures of other ranks; on rank 0 also whether heartbeats arrive."""
        while not self._ended.wait(min(_PEER_POLL_S, self._interval_s)):
            try:
                failures = self._failures()
                if failures and self._lost is None:
                    self._lost_at, self._lost = time.monotonic(), failures[0].seen_by_others()
                if self._world.rank == 0 and self._paused:
                    self._note_heartbeats(self._heartbeats(), time.monotonic())
                self._answered_at = time.monotonic()
            except (RuntimeError, OSError):
                continue  # the store has ended with rank 0, which may have finished

    def _note_heartbeats(self, beats: list[Heartbeat | None], now: float) -> None:
        for beat in beats:
            if beat is not None and self._changed_at.get(beat.rank, (-1, 0.0))[0] != beat.count:
                self._changed_at[beat.rank] = (beat.count, float("inf") if beat.doing == _ORDER[-1] else now)

    def _watch(self) -> None:
        while not self._ended.wait(min(_PEER_POLL_S, self._interval_s)):
            now = time.monotonic()
            if now - self._since > self._timeout_s:
                self._end()
            if self._lost is not None and now - self._lost_at > _GRACE_S:
                self.end_lost(self._lost)
            # Only where the main thread has paused: elsewhere it is the lack of progress that shows a lost rank.
            if self._paused and (silent := self._silent(now)):
                self.end_lost(silent)

    def _silent(self, now: float) -> LostRankError | None:
        """A rank whose heartbeats have stopped for ``timeout_s``; of rank 0 the others see that the store is silent."""
        if self._world.rank:
            if now - self._answered_at <= self._timeout_s:
                return None
            return LostRankError(f"lost a rank: {self._no_store()}", EXIT_HANG)
        silent = [rank for rank, (_, at) in self._changed_at.items() if now - at > self._timeout_s]
        if not silent:
            return None
        names = ", ".join(map(str, sorted(silent)))
        return LostRankError(
            f"lost a rank: {_NO_HEARTBEAT} rank {names} for {self._timeout_s:g} s (frozen, dead or disconnected)",
            EXIT_HANG,
        )

    def _send_heartbeat(self) -> None:
        self._count += 1
        beat = {"host": socket.gethostname(), "count": self._count, "step": self._noted[0]}
        with contextlib.suppress(RuntimeError, OSError):  # the store ended with rank 0; _diagnose reports it
            self._job.store.set(_key(self._world.rank), json.dumps({**beat, "doing": self._noted[1]}))

    def _diagnose(self) -> str:
        # In a thread with a timeout: a request to a store in a frozen process never returns.
        return within(8 * self._interval_s, self._compare_heartbeats) or self._no_store()

    def _compare_heartbeats(self) -> str:
        before = self._heartbeats()
        time.sleep(3 * self._interval_s)
        after = self._heartbeats()
        self._num_silent = len(find_silent(before, after))
        return find_stalled(before, after)

    def _no_store(self) -> str:
        return f"{_NO_HEARTBEAT} rank 0 on {os.environ['MASTER_ADDR']}, which runs the store of the process group"

    def _heartbeats(self) -> list[Heartbeat | None]:
        beats: list[Heartbeat | None] = []
        for rank in range(self._world.size):
            known = self._job.store.check([_key(rank)])
            beats.append(Heartbeat(rank, **json.loads(self._job.store.get(_key(rank)))) if known else None)
        return beats

    def _end(self) -> NoReturn:
        stack = self._dir / f"rank{self._world.rank:05d}.txt"
        try:
            stack.parent.mkdir(parents=True, exist_ok=True)
            with stack.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        step, doing = self._noted
        found = self._diagnose()
        print(
            f"error: rank {self._world.rank} made no progress for {self._timeout_s:g} s at step {step}, {doing}: "
            f"{found}. Stack traces are in {self._dir}; the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._tell_others(LostRankError(f"the job makes no progress: {found}", EXIT_HANG))
        # No clean exit is possible: collectives do not return, and destructors wait for them.
        kill_workers()
        os._exit(EXIT_HANG)

    def end_lost(self, lost: LostRankError) -> NoReturn:
        """Report which rank was lost, to the user and to the other ranks, and end this process."""
        rank, host = self._world.rank, socket.gethostname()
        where = f" (rank {rank} on {host})" if rank else ""
        print(f"error{where}: {lost}; the same command resumes", file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._tell_others(lost)
        within(_GRACE_S, lambda: multiprocessing.util._run_finalizers(0))  # type: ignore[attr-defined]  # private
        # Not sys.exit: destructors would wait for collectives that never end.
        kill_workers()
        os._exit(lost.exit_code)

    def _tell_others(self, lost: LostRankError) -> None:
        """Report that this rank ends because of ``lost``; rank 0 keeps the store until the others have read it."""
        # The same text: all survivors name the rank that was lost first, not those that end because of it.
        failure = Failure(self._world.rank, socket.gethostname(), "lost", str(lost), lost.exit_code)

        def request() -> None:
            self._job.report(failure)
            self._job.leave(LINGER_S if self._job.hosts else 0.0, self._num_silent)

        within(LINGER_S + 2, request)


@contextlib.contextmanager
def monitored(world: World, timeout_s: float, run_dir: Path) -> Iterator[Watchdog]:
    """Run a watchdog. If a collective fails because a rank was lost, name that rank and end this process."""
    watchdog = Watchdog(world, timeout_s, run_dir).start()
    try:
        yield watchdog
    except RuntimeError:
        if world.size > 1 and (lost := watchdog.find_lost()) is not None:
            watchdog.end_lost(lost)
        raise
    finally:
        watchdog.stop()


def _key(rank: int) -> str:
    return f"maestro/beat/{rank}"
