"""Rounds of training: kills, S3 faults and damage to the cache, other ranks and stages, full disks, stops, clocks."""

from __future__ import annotations

import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.chaos.clock import Clock
from tests.chaos.compare import compare_runs, compare_states
from tests.chaos.damages import CacheDamager
from tests.chaos.disks import small_disk
from tests.chaos.kills import STEP, Kill, draw_kill, perform
from tests.chaos.objects import BUCKET, environment
from tests.chaos.processes import WORKER
from tests.chaos.round import Round
from tests.chaos.rounds.common import faulty_s3, killed_start
from tests.chaos.site import CACHE_GIB

_FULL = r"No space left|no space left|cannot be written"
_HUNG = r"no heartbeat from|made no progress|wait for rank"


def kill(r: Round) -> None:
    """Three kills of random processes at random moments, then to the end; bitwise compared."""
    stage = r.rng.choice((0, 1, 2, 3))
    reference = r.site.training(2, stage).folder
    command = _command(r, 2, stage)
    for _ in range(3):
        if not killed_start(r, command(), draw_kill(r.rng)):
            break
    if r.must_succeed(r.start(command())):
        r.found(compare_runs(r.run_dir, reference, exact=True))


def s3(r: Round) -> None:
    """Training from S3 through a proxy with faults, a small cache that is damaged, a mirror; one kill; the run
    directory's checkpoints are then lost and come back from the mirror."""
    reference = r.site.training(2, 2).folder
    with faulty_s3(r, rate=0.25) as env:
        damager = CacheDamager(
            r.folder / "cache",
            random.Random(r.rng.random()),
            0.5,
            lambda kind: r.outcome.inject(f"cache file {kind}"),
        )
        mirror = f"checkpoint.mirror=s3://{BUCKET}/{r.name}"
        recipe = r.site.recipe(r.folder, r.site.shards_url)
        command = r.site.train(recipe, r.run_dir, 2, f"data.cache_gib={CACHE_GIB}", mirror)
        with damager:
            killed_start(r, command, draw_kill(r.rng), **env)
            if not r.must_succeed(r.start(command, **env)):
                return
        r.found(compare_runs(r.run_dir, reference, exact=True))
        shutil.rmtree(r.run_dir / "checkpoints")
        r.outcome.inject("checkpoints lost, restored from the mirror")
        if r.must_succeed(r.start(command, **env)):
            restored = sorted(p.name for p in (r.run_dir / "checkpoints").iterdir())
            shutil.rmtree(r.folder / "newest", ignore_errors=True)
            newest = r.folder / "newest" / "checkpoints" / restored[-1]
            shutil.copytree(reference / "checkpoints" / restored[-1], newest)
            r.found(compare_states(r.run_dir, r.folder / "newest", exact=True))


def elastic(r: Round) -> None:
    """Ranks 1, 2 and 1 again, each with a random ZeRO stage, with a kill at every change; the same keys, and losses and
    weights within rounding."""
    reference = r.site.training(2, 2).folder
    layouts = [(ranks, r.rng.choice((0, 1, 2, 3))) for ranks in (1, 2, 1, r.rng.choice((1, 2)))]
    for number, (ranks, stage) in enumerate(layouts):
        if number:
            r.outcome.inject(f"resume on {ranks} rank{'s' * (ranks > 1)} with ZeRO stage {stage}")
        command = _command(r, ranks, stage)()
        if number == len(layouts) - 1:
            if r.must_succeed(r.start(command)):
                r.found(compare_runs(r.run_dir, reference, exact=False))
            return
        targets = ("rank 0", "rank 1", "all processes") if ranks == 2 else ("rank 0", "all processes")
        killed_start(r, command, draw_kill(r.rng, targets, max_steps=5))


def disk(r: Round) -> None:
    """The file system of the run directory, or of the cache, is too small; then it is enlarged and the run resumes."""
    reference = r.site.training(2, 2).folder
    place = r.rng.choice(("run directory", "cache"))
    mounted = r.folder / ("disk" if place == "run directory" else "cache")
    with small_disk(mounted, r.rng.randint(1000, 7000) if place == "run directory" else 2500) as small:
        if place == "run directory":
            r.run_dir = mounted / "run"
            command, env = _command(r, 2, 2)(), {}
        else:
            recipe = r.site.recipe(r.folder, r.site.shards_url, mounted)
            command, env = r.site.train(recipe, r.run_dir, 2), environment(r.site.objects.port)
        start = r.start(command, **env)
        r.must_fail(start, (2,), _FULL)
        r.outcome.inject(f"full tmpfs: {place}")
        small.resize(60_000)
        if r.must_succeed(r.start(command, **env)):
            r.found(compare_runs(r.run_dir, reference, exact=True))
        if place == "run directory":  # what is left behind is checked after the disk is unmounted
            shutil.copytree(r.run_dir, r.folder / "run")


def stop(r: Round) -> None:
    """SIGSTOP of a process: the watchdog ends the job and names the rank; the run then resumes."""
    reference = r.site.training(2, 2)
    # Longer than the start takes on this machine: it makes no progress either.
    timeout_s = max(20, round(reference.seconds))
    target = r.rng.choice(("rank 0", "rank 1", WORKER))
    stopped = Kill(target, STEP, r.rng.randint(1, 12), r.rng.uniform(0, 0.1), signal.SIGSTOP)
    start = r.start(_command(r, 2, 2)(f"train.hang_timeout_s={timeout_s}"))
    if perform(stopped, start, r.run_dir, r.site.limit_s):
        r.outcome.inject(stopped.name)
        r.must_fail(start, (3,), _HUNG)
    else:
        r.must_succeed(start)
    if r.must_succeed(r.start(_command(r, 2, 2)())):
        r.found(compare_runs(r.run_dir, reference.folder, exact=True))


def clock(r: Round) -> None:
    """The wall clock of all processes jumps back and forth while they train from S3 with faults."""
    reference = r.site.training(2, 2).folder
    shifted = Clock(r.site.folder / "clock")
    recipe = r.site.recipe(r.folder, r.site.shards_url)
    command = r.site.train(recipe, r.run_dir, 2, f"data.cache_gib={CACHE_GIB}")
    with faulty_s3(r, rate=0.1, max_hangs=0) as env, _jumps(r, shifted):
        if r.must_succeed(r.start(command, **env, **shifted.env)):
            r.found(compare_runs(r.run_dir, reference, exact=True))


def _command(r: Round, ranks: int, stage: int) -> Callable[..., list[str]]:
    recipe = r.site.recipe(r.folder)

    def command(*changes: str) -> list[str]:
        return r.site.train(recipe, r.run_dir, ranks, f"deepspeed.zero_optimization.stage={stage}", *changes)

    return command


@contextmanager
def _jumps(r: Round, shifted: Clock) -> Iterator[None]:
    """Let the clock jump at random moments, by seconds to months in both directions."""
    ended, rng = threading.Event(), random.Random(r.rng.random())

    def run() -> None:
        while not ended.wait(rng.uniform(0.1, 1.5)):
            shifted.jump_to(rng.choice((-1, 1)) * 10 ** rng.uniform(0, 7))
            r.outcome.inject("clock jump")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        shifted.jump_to(0)
