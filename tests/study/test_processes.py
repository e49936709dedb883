"""Forked processes of a study: exit codes, logs, signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from maestro_scale.errors import MaestroError
from maestro_scale.study.processes import STOPPED, StopFlag, fork, last_error, poll, wait


def fail(error: Exception) -> int:
    raise error


def test_the_exit_code_and_output_of_a_child(tmp_path, capfd):
    log = tmp_path / "sub" / "log.txt"
    stop = StopFlag()
    assert wait(fork(lambda: 7, log), stop) == 7
    assert wait(fork(lambda: print("hello") or 0, log), stop) == 0
    assert wait(fork(lambda: fail(MaestroError("no such shard")), log), stop) == 1
    assert log.read_text().splitlines()[0] == "hello"
    assert last_error(log) == "error: no such shard"
    assert wait(fork(lambda: fail(ValueError("a bug")), log), stop) == 1
    assert "Traceback" in log.read_text()
    assert capfd.readouterr().out == ""
    assert stop.children == set()


def test_a_killed_child_has_the_code_of_its_signal(tmp_path):
    pid = fork(lambda: time.sleep(60) or 0, tmp_path / "log")
    os.kill(pid, signal.SIGKILL)
    assert wait(pid, StopFlag()) == 128 + signal.SIGKILL


def test_a_stop_request_is_forwarded_once_to_every_child(tmp_path):
    def work(name: str) -> int:
        stop = StopFlag().install()
        (tmp_path / name).touch()
        while not stop.is_set:
            time.sleep(0.01)
        return STOPPED

    stop = StopFlag()
    pids = [fork(lambda name=name: work(name), None, session=True) for name in ("a", "b")]
    stop.children |= set(pids)
    deadline = time.monotonic() + 20
    while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [poll(pid) for pid in pids] == [None, None]
    stop._on_signal(signal.SIGTERM, None)
    assert [wait(pid, stop) for pid in pids] == [STOPPED, STOPPED]


def test_a_child_ends_with_its_parent(tmp_path):
    def parent() -> int:
        child = fork(lambda: time.sleep(60) or 0, None, session=True)
        (tmp_path / "pid").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    wait(fork(parent, None), StopFlag())
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_last_error_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert last_error(log) == "no output"
    log.write_text("== train.py\n\nerror: a\nstep 1\nerror: b\nlast\n")
    assert last_error(log) == "error: b"
    log.write_text("x" * 50_000 + "\nZeroDivisionError: division by zero\n")
    assert last_error(log) == "ZeroDivisionError: division by zero"
