"""Semaphores that killed jobs have left in /dev/shm."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maestro_scale.stream import semaphores
from maestro_scale.stream.semaphores import owned_semaphores, remove_abandoned

OWNER = """
import multiprocessing, sys, time
from multiprocessing import resource_tracker
from maestro_scale.stream.semaphores import owned_semaphores

with owned_semaphores():
    lock = multiprocessing.get_context("forkserver").Lock()
    print(lock._semlock.name, resource_tracker._resource_tracker._pid, flush=True)
time.sleep(600)
"""

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")


def test_semaphores_of_a_killed_job_are_removed_and_those_of_a_running_one_stay():
    owners = [
        subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        (killed, tracker), (running, _) = ((owner.stdout.readline().split()) for owner in owners)
        os.kill(int(tracker), signal.SIGKILL)  # else it would clean up
        owners[0].kill()
        owners[0].wait()
        files = [Path("/dev/shm") / f"sem.{name.removeprefix('/')}" for name in (killed, running)]
        assert [file.exists() for file in files] == [True, True]
        assert remove_abandoned() >= 1
        assert [file.exists() for file in files] == [False, True]
        assert not list(Path("/dev/shm").glob(f"maestro-{owners[0].pid}-*"))
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()


def test_only_semaphores_of_a_marked_owner_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(semaphores, "_prefix", None)
    others = ("sem.mp-abc", "sem.loky-1-abc", "torch_1_2", "sem.maestro-2-cd-x")
    for name in (*others, "sem.maestro-1-ab-x", "maestro-1-ab.lock"):
        (tmp_path / name).touch()
    with owned_semaphores(tmp_path):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    (own,) = left - set(others)
    assert own.startswith(f"maestro-{os.getpid()}-")
    assert left - {own} == set(others)
    assert remove_abandoned(tmp_path) == 0  # its own is locked
    assert (tmp_path / own).exists()


def test_names_of_other_semaphores_do_not_change():
    with owned_semaphores():
        inside = multiprocessing.get_context("spawn").Lock()
    outside = multiprocessing.get_context("spawn").Lock()
    assert inside._semlock.name.startswith(f"/maestro-{os.getpid()}-")
    assert "maestro" not in outside._semlock.name


def test_a_killed_process_leaves_neither_semaphores_nor_a_line_about_them():
    """The resource tracker, which survives the process, removes them."""
    script = """
import multiprocessing, os, signal
from maestro_scale.stream.semaphores import start_tracker
start_tracker()
lock = multiprocessing.get_context("spawn").Lock()
print(lock._semlock.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # The tracker ends after the process, and holds its standard error open until then.
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGKILL, "")
    assert not Path(f"/dev/shm/sem.{ended.stdout.strip().removeprefix('/')}").exists()
