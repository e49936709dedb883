"""Ends a job that hangs, and names the rank it hangs on: every rank has a heart and a watcher beside its main thread.

Each rank's heart beats into the store that the ranks met through. A rank whose main thread makes no progress for
``timeout_s`` looks at the others: one without a heartbeat is frozen or dead; else the one that is furthest behind
holds the rest up. The store lives in rank 0: where that is frozen, whoever asks it waits for ever, so only threads that
nobody waits for do.
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
_SLOWEST_BEAT_S = 5.0
_ORDER = ("starting", "waiting for data", "computing", "evaluating", "writing", "ending")


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself. ``step``: the one it is at."""

    rank: int
    host: str
    count: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, last seen at step {self.step}, {self.doing}"

    @property
    def progress(self) -> tuple[int, int]:
        """Grows as the rank goes on."""
        return self.step, _ORDER.index(self.doing)


def blame(before: list[Beat | None], after: list[Beat | None]) -> str:
    """Which ranks hold a job up, from two looks at their beats, far enough apart for each to have beaten between."""
    silent = [
        f"rank {rank}, which was never seen" if a is None else str(a)
        for rank, (b, a) in enumerate(zip(before, after, strict=True))
        if a is None or (b is not None and b.count == a.count)
    ]
    if silent:
        return f"no sign of life from {'; '.join(silent)} (frozen, dead or cut off)"
    alive = [a for a in after if a is not None]
    least = min(a.progress for a in alive)
    behind = [a for a in alive if a.progress == least]
    if len(behind) == len(alive):
        return f"all {len(alive)} ranks are at step {behind[0].step}, {behind[0].doing}"
    return f"the others wait for {'; '.join(map(str, behind))}"


class Watchdog:
    """Runs between ``start`` and ``stop``. The main thread says where it is by ``note``."""

    def __init__(self, world: World, timeout_s: float, run_dir: Path) -> None:
        self._world, self._timeout_s, self._dir = world, timeout_s, run_dir / "hang"
        self._beat_s = min(_SLOWEST_BEAT_S, timeout_s / 8)
        self._noted, self._since = (0, _ORDER[0]), time.monotonic()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._live, daemon=True, name="maestro-heart")
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="maestro-watchdog")
        self._count = 0
        # A connection of its own: the process group's may be blocked in a wait.
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(4 * self._beat_s, 2)),
        )

    def start(self) -> Watchdog:
        """Begin to beat and to watch."""
        self._beat()
        self._heart.start()
        self._watcher.start()
        return self

    def stop(self) -> None:
        """The job is over; nobody is late any more."""
        self._ended.set()
        for thread in (self._heart, self._watcher):
            thread.join(4 * self._beat_s)

    def note(self, step: int, doing: str) -> None:
        """The main thread is at ``step``, and ``doing`` is one of ``_ORDER``."""
        self._noted, self._since = (step, doing), time.monotonic()

    def missing(self) -> str | None:
        """After a failed collective: the ranks that are silent, in words, or None. Takes a few beats."""
        found = self._look()
        return found if found.startswith("no sign") else None

    def _live(self) -> None:
        while not self._ended.wait(self._beat_s):
            self._beat()

    def _watch(self) -> None:
        while not self._ended.wait(self._beat_s):
            if time.monotonic() - self._since > self._timeout_s:
                self._end()

    def _beat(self) -> None:
        self._count += 1
        beat = {"host": socket.gethostname(), "count": self._count, "step": self._noted[0]}
        with contextlib.suppress(RuntimeError, OSError):  # the store went down with its rank; _look says so
            self._store.set(_key(self._world.rank), json.dumps({**beat, "doing": self._noted[1]}))

    def _look(self) -> str:
        found: list[str] = []
        looking = threading.Thread(target=lambda: found.append(self._asked()), daemon=True)
        looking.start()
        looking.join(8 * self._beat_s)
        return found[0] if found else self._no_store()

    def _asked(self) -> str:
        try:
            before = self._beats()
            time.sleep(3 * self._beat_s)
            return blame(before, self._beats())
        except (RuntimeError, OSError):
            return self._no_store()

    def _no_store(self) -> str:
        return f"no sign of life from rank 0 on {os.environ['MASTER_ADDR']}, through which the ranks met"

    def _beats(self) -> list[Beat | None]:
        beats: list[Beat | None] = []
        for rank in range(self._world.size):
            known = self._store.check([_key(rank)])
            beats.append(Beat(rank, **json.loads(self._store.get(_key(rank)))) if known else None)
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
            f"{self._look()}. Stacks are in {self._dir}; the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        # What is left of the job cannot be ended well: collectives do not return, destructors wait for them.
        os._exit(EXIT_HANG)


@contextlib.contextmanager
def monitored(world: World, timeout_s: float, run_dir: Path) -> Iterator[Watchdog]:
    """Run a watchdog. Where a collective fails because a rank is gone, that rank is named and this process ends."""
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
