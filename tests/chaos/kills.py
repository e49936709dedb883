"""Kill schedules: which process is killed at which moment, drawn from the round's random numbers."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.processes import LAUNCHER, WORKER, Start, of_role, send, tagged
from tests.testkit.runs import metrics

START_UP, STEP, COMMIT = "during start-up", "at a step", "during a commit"
TARGETS = ("rank 0", "rank 1", WORKER, LAUNCHER, "all processes")
_POLL_S = 0.002


@dataclass(frozen=True)
class Kill:
    """Send ``number`` to ``target`` at a moment: ``delay_s`` after the start, after ``steps`` further logged steps, or
    after the staging folder of a checkpoint appears once ``steps`` further steps are logged."""

    target: str
    moment: str
    steps: int
    delay_s: float
    number: signal.Signals = signal.SIGKILL

    @property
    def name(self) -> str:
        """As it is counted."""
        return f"{self.number.name} {self.target}" + (f" {COMMIT}" if self.moment == COMMIT else "")


def draw_kill(rng: random.Random, targets: tuple[str, ...] = TARGETS, max_steps: int = 7) -> Kill:
    """A random kill of a training; half of them during a commit, one of eight while the processes start."""
    target, moment = (
        rng.choice(targets),
        rng.choice((START_UP, STEP, STEP, STEP, COMMIT, COMMIT, COMMIT, COMMIT)),
    )
    if target == WORKER:
        moment = STEP  # there are none while the processes start
    delay = {START_UP: rng.uniform(0.5, 8.0), STEP: rng.uniform(0, 0.1), COMMIT: rng.uniform(0, 0.02)}[moment]
    return Kill(target, moment, rng.randint(1, max_steps), delay)


def perform(kill: Kill, start: Start, run_dir: Path, limit_s: float) -> bool:
    """Wait for the moment and send the signal; False if the command ended before, or after ``limit_s``."""
    if not wait_for(kill, start, run_dir, limit_s):
        return False
    return strike(kill, start)


def wait_for(kill: Kill, start: Start, run_dir: Path, limit_s: float) -> bool:
    """Wait for the moment of a kill; False if the command ended before, or after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    if kill.moment != START_UP:
        before = last_step(run_dir)
        if not _wait(start, deadline, lambda: last_step(run_dir) >= before + kill.steps):
            return False
    if kill.moment == COMMIT and not _wait(
        start, deadline, lambda: any((run_dir / "checkpoints").glob(".staging_*"))
    ):
        return False
    until = time.monotonic() + kill.delay_s
    while time.monotonic() < until and start.running:
        time.sleep(_POLL_S)
    return start.running


def strike(kill: Kill, start: Start) -> bool:
    """Send the signal now; whether a process got it."""
    if kill.target == "all processes":
        return send([f.pid for f in tagged(start.tag)], kill.number) > 0
    pids = of_role(start.tag, kill.target)
    # Loader workers are alike; the launcher is two processes, which end together where a terminal or SLURM kills it.
    return send(pids[:1] if kill.target == WORKER else pids, kill.number) > 0


def last_step(run_dir: Path) -> int:
    """The last logged step, 0 if there is none."""
    return max((line["step"] for line in metrics(run_dir)), default=0)


def _wait(start: Start, deadline: float, reached: Callable[[], bool]) -> bool:
    while not reached():
        if not start.running or time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
