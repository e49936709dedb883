"""Ranks end with their launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maestro_scale import launcher_death
from maestro_scale.launcher_death import identity, launchers, parent_of
from maestro_scale.training.stop import StopRequest

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")

RANK = """
import sys, time
from maestro_scale.launcher_death import watch_launcher
watch_launcher()
print("ready", flush=True)
time.sleep(600)
"""
LAUNCHER = """
import os, subprocess, sys, time
env = {**os.environ, "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=env, stdout=subprocess.PIPE, text=True)
assert rank.stdout.readline() == "ready\\n"
print(rank.pid, flush=True)
time.sleep(600)
"""


def test_a_rank_ends_when_its_launcher_is_killed():
    command = [sys.executable, "-c", LAUNCHER, RANK]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rank = int(launcher.stdout.readline())
    started = identity(rank)
    assert started is not None
    launcher.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while identity(rank) == started:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    _, errors = launcher.communicate(timeout=20)
    assert errors == f"error: rank 0 stopped by the end of its launcher (process {launcher.pid})\n"


WITH_WORKER = """
import multiprocessing, os, signal, sys, time
from maestro_scale import launcher_death

def work(ready):
    launcher_death.exit_with_parent()
    ready.set()
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    ready.wait()
    os.kill(worker.pid, signal.SIGSTOP)
    print(worker.pid, flush=True)
    launcher_death._leave("a test")
"""


def test_a_rank_that_leaves_ends_its_stopped_worker(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(WITH_WORKER)
    # Its output ends when the fork server and the resource tracker have ended too, which wait for the worker.
    rank = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert rank.returncode == 3
    assert rank.stderr.startswith("error: rank 0 stopped by a test\n")
    assert identity(int(rank.stdout)) is None


def test_only_launchers_that_stay_are_watched():
    own = os.getpid()
    assert launchers({}, own) == []
    assert launchers({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, own) == []  # a script, under nohup
    assert launchers({"TORCHELASTIC_RUN_ID": "x"}, own) == []  # not a rank: a tool that a rank started
    assert launchers({"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, own) == [identity(own)]
    assert launchers({"RANK": "0", "CROSS_RANK": "0"}, own) == [identity(own)]  # pytest is not `deepspeed`


def test_the_deepspeed_command_is_watched_too(monkeypatch):
    monkeypatch.setattr(
        launcher_death, "_command", lambda pid: [b"/usr/bin/python3", b"/env/bin/deepspeed", b"train.py"]
    )
    own = os.getpid()
    watched = launchers({"RANK": "0", "CROSS_RANK": "0"}, own)
    assert watched == [identity(own), identity(parent_of(own))]


def test_an_ended_process_has_no_identity():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: it has ended, and keeps its number
    assert identity(process.pid) is None
    process.wait()
    assert identity(process.pid) is None


class Left(Exception):
    pass


def leave(reason: str) -> None:
    raise Left(reason)


def test_a_rank_without_a_training_loop_leaves_at_once():
    stop = StopRequest()
    with pytest.raises(Left, match="the end"):
        launcher_death._end("the end", stop, leave, grace_s=60)
    assert stop.reason is None


def test_a_training_loop_that_does_not_notice_the_request_is_ended():
    stop = StopRequest()
    stop.requested()
    with pytest.raises(Left):
        launcher_death._end("the end", stop, leave, grace_s=0.2)
    assert stop.reason == "the end"


def test_a_training_loop_that_notices_the_request_saves_and_ends_by_itself(monkeypatch):
    class Saves(Exception):
        pass

    class Event:
        def wait(self) -> None:
            raise Saves

    stop = StopRequest()
    stop.requested()
    monkeypatch.setattr(launcher_death.time, "sleep", lambda s: stop.requested())  # the loop's next step
    monkeypatch.setattr(launcher_death.threading, "Event", Event)
    with pytest.raises(Saves):
        launcher_death._end("the end", stop, leave, grace_s=60)
    assert stop.reason == "the end"
