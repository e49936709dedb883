"""The watchdog: which rank was lost, and when a rank that makes no progress counts as hanging."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from maestro_scale.training import watchdog
from maestro_scale.training.distributed import free_port
from maestro_scale.training.job_store import Failure, LostRankError
from maestro_scale.training.watchdog import Heartbeat, Watchdog, find_silent, find_stalled, monitored


def beat(rank: int, count: int, step: int = 3, doing: str = "computing") -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", count, step, doing)


def test_a_rank_that_has_finished_is_not_silent():
    before = [beat(0, 1), beat(1, 7, doing="ended"), beat(2, 4), None]
    after = [beat(0, 2), beat(1, 7, doing="ended"), beat(2, 4), None]
    assert find_silent(before, after) == [2, 3]
    assert find_stalled(before, after) == (
        "no heartbeat from rank 2 on node2, last at step 3, computing; rank 3, which never sent one "
        "(frozen, dead or disconnected)"
    )


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """``make(rank, timeout_s)``: the watchdog of a rank of two, whose end is recorded in ``ended``."""
    server = dist.TCPStore(
        "127.0.0.1", port := free_port(), 2, True, timedelta(seconds=10), wait_for_workers=False
    )
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(watchdog, "_PEER_POLL_S", 0.1)
    monkeypatch.setattr(watchdog, "_GRACE_S", 0.3)
    ended: dict[int, str] = {}
    done = threading.Event()

    def end(self: Watchdog, lost: LostRankError | None = None) -> None:
        ended.setdefault(self._world.rank, "hang" if lost is None else str(lost))
        done.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    monkeypatch.setattr(Watchdog, "end_lost", end)
    started: list[Watchdog] = []

    def make(rank: int, timeout_s: float = 60) -> Watchdog:
        world = SimpleNamespace(rank=rank, size=2)
        started.append(Watchdog(world, timeout_s, tmp_path))  # type: ignore[arg-type]  # not a World
        return started[-1]

    yield SimpleNamespace(make=make, ended=ended, done=done, server=server)
    for each in started:
        each._ended.set()


def test_a_rank_ends_soon_after_another_one_reports_a_failure(ranks):
    survivor, failed = ranks.make(0).start(), ranks.make(1)
    failed._job.report(Failure(1, "b", "error", "disk", 2))
    assert ranks.done.wait(20)
    assert ranks.ended == {0: "lost rank 1 on b, which ended with its own error message (exit code 2)"}
    survivor.stop()


def test_a_rank_that_fails_at_the_same_time_is_given_time_to_report(ranks, monkeypatch):
    monkeypatch.setattr(watchdog, "_GRACE_S", 60)
    survivor, failed = ranks.make(0).start(), ranks.make(1)
    failed._job.report(Failure(1, "b", "error", "disk", 2))
    time.sleep(0.5)
    assert not ranks.ended
    survivor.stop()


def test_after_a_failed_collective_the_report_of_a_rank_names_the_cause(ranks):
    survivor = ranks.make(0)
    ranks.make(1)._job.report(Failure(1, "b", "bug", "ValueError: x", 1))
    lost = survivor.find_lost()
    assert (
        str(lost) == "lost rank 1 on b, which ended with an unexpected error and its traceback (exit code 1)"
    )
    assert lost.exit_code == 1


def test_after_a_failed_collective_a_killed_rank_is_named_by_its_heartbeats(ranks):
    survivor = ranks.make(0, timeout_s=0.8)
    ranks.make(1)._send_heartbeat()  # and no other
    with pytest.raises(
        RuntimeError, match="Connection closed"
    ):  # end_lost, which is replaced, would not return
        collective_fails(survivor, "Connection closed by peer")
    assert ranks.ended[0].startswith("lost a rank: no heartbeat from rank 1 on ")


def collective_fails(of: Watchdog, message: str) -> None:
    with monitored(of._world, 0.8, of._dir) as own:
        own.pause()
        raise RuntimeError(message)


def test_an_error_of_this_rank_alone_is_raised(ranks):
    ranks.make(0, timeout_s=0.8).start().pause()
    with pytest.raises(RuntimeError, match="a bug"):
        collective_fails(ranks.make(1, timeout_s=0.8), "a bug")
    assert not ranks.ended


def test_a_paused_rank_may_take_any_time_as_long_as_heartbeats_arrive(ranks):
    both = [ranks.make(rank, timeout_s=0.5).start() for rank in range(2)]
    for each in both:
        each.pause()  # rank 0 fits a classifier, and rank 1 waits for it
    time.sleep(2)
    assert not ranks.ended
    both[1].note(1, "computing")  # progress counts again
    assert ranks.done.wait(20)
    assert ranks.ended == {1: "hang"}


def test_a_frozen_rank_ends_a_paused_job(ranks):
    main = ranks.make(0, timeout_s=0.8).start()
    main.pause()
    ranks.make(1, timeout_s=0.8)._send_heartbeat()  # and no other
    assert ranks.done.wait(20)
    assert ranks.ended[0].startswith("lost a rank: no heartbeat from rank 1 for 0.8 s")


def test_a_rank_that_has_finished_is_not_missed(ranks):
    main = ranks.make(0, timeout_s=0.5).start()
    main.pause()
    ranks.make(1, timeout_s=0.5).start().stop()
    time.sleep(1.5)
    assert not ranks.ended
