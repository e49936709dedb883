"""The rendezvous store: ports in use, other jobs, ranks that do not join, and failures that ranks report."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from maestro_scale.errors import MaestroError
from maestro_scale.training import failure, job_store
from maestro_scale.training.binding import Launch
from maestro_scale.training.distributed import _exchange, _join, free_port
from maestro_scale.training.job_store import Failure, LostRankError, RendezvousError, job_token, join


def launch(rank: int, size: int = 2, launcher: str = "environment", local_size: int | None = None) -> Launch:
    return Launch(launcher, rank, size, rank, local_size)


@pytest.fixture
def port(monkeypatch) -> int:
    number = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(job_store, "_current", None)
    monkeypatch.setattr(job_store, "_FOREIGN_S", 1.0)
    return number


@contextlib.contextmanager
def silent_server(port: int):
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen()
        yield


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_in_use_is_one_line_on_every_rank(port, rank):
    started = time.monotonic()
    with silent_server(port), pytest.raises(RendezvousError) as raised:
        join(launch(rank), 60)
    assert f"port {port} on 127.0.0.1 is in use by another program" in str(raised.value)
    assert "--master_port" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 15


def test_a_rank_that_is_alone_uses_another_port(port):
    with silent_server(port):
        job = _join(launch(0, size=1), lambda: None)
        assert os.environ["MASTER_PORT"] != str(port)
        assert _exchange(job, "text", lambda: None) == ["text"]


def test_a_rank_does_not_join_another_job(port):
    other = join(launch(0, size=3), 10)  # three ranks there, two here
    with pytest.raises(RendezvousError, match="in use by another program"):
        join(launch(1), 10)
    assert not other.store.check(["maestro/joined/1"])


def test_a_rank_cannot_join_twice(port):
    host = join(launch(0), 10)
    join(launch(1), 10)
    with pytest.raises(RendezvousError, match="in use by another program"):
        join(launch(1), 10)
    assert host.store.add("maestro/joined/1", 0) == 2


def test_ranks_that_do_not_join_are_named(port, monkeypatch):
    monkeypatch.setattr("maestro_scale.training.distributed._JOIN_S", 0.5)
    job = join(launch(0, size=4), 10)
    job.store.set("maestro/text/2", "here")
    with pytest.raises(RendezvousError, match=r"ranks 1, 3 of 4 did not join within 0\.5 s"):
        _exchange(job, "text", lambda: None)


def test_a_signal_ends_the_wait_for_other_ranks(port, monkeypatch):
    monkeypatch.setattr(job_store, "_INTERRUPT_S", 0.2)
    job = join(launch(0), 10)
    with pytest.raises(RendezvousError, match="stopped by SIGTERM before all ranks had joined"):
        _exchange(job, "text", lambda: "SIGTERM")


def test_rank_0_that_does_not_start_is_reported(port):
    with pytest.raises(RendezvousError, match=f"rank 0 did not start within 0.5 s: 127.0.0.1:{port}"):
        join(launch(1), 0.5)


@pytest.mark.parametrize("text", ["", "abc", "0", "70000"])
def test_a_port_that_is_not_a_port(port, monkeypatch, text):
    monkeypatch.setenv("MASTER_PORT", text)
    with pytest.raises(RendezvousError, match="is not a port"):
        join(launch(0), 1)


def test_all_ranks_exchange_texts(port):
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda r: join(launch(r), 20), range(2)))
        texts = pool.map(lambda job: _exchange(job, f"of {job.rank}", lambda: None), jobs)
        assert list(texts) == [["of 0", "of 1"]] * 2


def test_a_rank_that_fails_before_it_joins_is_named_by_the_others(port):
    host = join(launch(0), 10)
    job = join(launch(1), 10)
    job.report(Failure(1, "node7", "error", "disk: cannot be read", 2))
    with pytest.raises(LostRankError) as raised:
        _exchange(host, "text", lambda: None)
    assert str(raised.value) == "lost rank 1 on node7, which ended with its own error message (exit code 2)"
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bug", "lost rank 1 on a, which ended with an unexpected error and its traceback (exit code 1)"),
        # A survivor repeats what it has lost: the others name the first cause.
        ("lost", "because"),
    ],
)
def test_messages_of_the_others(kind, text):
    lost = Failure(1, "a", kind, "because", 1).seen_by_others()
    assert (str(lost), lost.exit_code) == (text, 1)


def test_tokens_differ_between_jobs_and_not_between_ranks():
    deepspeed = [launch(r, launcher="deepspeed", local_size=2) for r in range(2)]
    assert job_token({}, deepspeed[0]) == job_token({}, deepspeed[1])
    assert str(os.getppid()) in job_token({}, deepspeed[0])
    # Over nodes the parents differ.
    assert str(os.getppid()) not in job_token({}, launch(0, 4, "deepspeed", local_size=2))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert job_token(slurm, launch(0, launcher="srun")) != job_token(
        {**slurm, "SLURM_STEP_ID": "1"}, launch(0, launcher="srun")
    )


def ended(jobs: dict[int, job_store.JobStore], errors: dict[int, Exception], monkeypatch) -> list[int]:
    """The ranks that print, of those that end with ``errors`` at the same time."""
    current = threading.local()
    monkeypatch.setattr(failure, "current", lambda: current.job)
    printed: list[int] = []

    def end(rank: int) -> None:
        current.job = jobs[rank]
        failure.end_rank(errors[rank], str(errors[rank]), rank, 2, lambda: printed.append(rank))

    with ThreadPoolExecutor(len(errors)) as pool:
        list(pool.map(end, errors))
    return sorted(printed)


@pytest.mark.parametrize(
    ("texts", "printing"), [(["the same"] * 2, [0]), (["one", "another"], [0, 1]), (["alone"], [0])]
)
def test_an_error_of_several_ranks_is_printed_once(port, monkeypatch, texts, printing):
    monkeypatch.setattr(failure, "_NOTICE_S", 0.3)
    monkeypatch.setattr(failure, "LINGER_S", 0.3)
    jobs = {rank: join(launch(rank), 10) for rank in range(2)}
    errors: dict[int, Exception] = {rank: MaestroError(text) for rank, text in enumerate(texts)}
    assert ended(jobs, errors, monkeypatch) == printing
    assert [(f.rank, f.text, f.exit_code) for f in sorted(jobs[0].failures(), key=lambda f: f.rank)] == [
        (rank, text, 2) for rank, text in enumerate(texts)
    ]


def test_the_host_of_the_store_waits_until_the_others_have_read(port):
    host, other = join(launch(0), 10), join(launch(1), 10)
    timer = threading.Timer(0.5, lambda: other.leave(0))
    timer.start()
    started = time.monotonic()
    host.leave(30)
    assert 0.4 < time.monotonic() - started < 10
    timer.join()


def test_a_mistake_that_every_rank_finds_before_it_joins_is_printed_by_rank_0(port, monkeypatch):
    class Common(MaestroError):
        same_on_all_ranks = True

    monkeypatch.setattr(failure, "_open", lambda timeout_s: pytest.fail("rank 0 must not wait"))
    printed: list[str] = []
    failure.end_rank(Common("x"), "x", 0, 2, lambda: printed.append("x"))
    assert printed == ["x"]
