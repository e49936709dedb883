"""Steps that several rounds share: a start that is killed, and S3 with faults."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from tests.chaos.kills import START_UP, Kill, perform
from tests.chaos.objects import environment
from tests.chaos.processes import WORKER, Start
from tests.chaos.proxy import FaultyProxy, random_faults
from tests.chaos.round import Round
from tests.chaos.site import Reference


def killed_start(r: Round, command: list[str], kill: Kill, **env: str) -> bool:
    """Start a command and kill a process of it; False if the command ended before."""
    start = r.start(command, **env)
    if perform(kill, start, r.run_dir, r.site.limit_s):
        r.outcome.inject(kill.name)
        if kill.target == WORKER:  # its rank reports it, unless all batches are built
            r.must_fail(start, (2,), "a loader process died", or_succeed=True)
        else:
            r.was_killed(start)
        return True
    r.must_succeed(start)
    return False


def kill_after(r: Round, start: Start, reference: Reference, target: str, what: str) -> bool:
    """Kill a process of a start after a random part of the reference's duration; False if the command ended before."""
    moment = Kill(target, START_UP, 0, r.rng.uniform(0.2, 1.0) * reference.seconds)
    if not perform(moment, start, r.run_dir, r.site.limit_s):
        # It has just ended, or the rank that was to be killed has: then the rest of the processes ends by itself.
        r.must_succeed(start)
        return False
    r.outcome.inject(f"SIGKILL {target} of {what}")
    r.was_killed(start)
    return True


@contextmanager
def faulty_s3(r: Round, rate: float, max_hangs: int = 1) -> Iterator[dict[str, str]]:
    """Variables that lead to a proxy with random faults."""
    choose = random_faults(random.Random(r.rng.random()), rate, max_hangs=max_hangs)
    with FaultyProxy(
        r.site.objects.port,
        choose,
        lambda kind: r.outcome.inject(f"S3 {kind}"),
        random.Random(r.rng.random()),
    ) as proxy:
        yield environment(proxy.port)
        r.outcome.inject("S3 requests, with and without fault", proxy.num_requests)
