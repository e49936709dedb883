"""Locks between a process and the children that it forks."""

from __future__ import annotations

import multiprocessing
import time

from maestro_scale.shards.locks import file_lock


def test_a_forked_child_gets_the_lock_that_its_parent_held(tmp_path):
    """It has a copy of the descriptor, which must not keep the file locked."""

    def lock() -> None:
        with file_lock(tmp_path / "a.lock"):
            pass

    child = multiprocessing.get_context("fork").Process(target=lock)
    with file_lock(tmp_path / "a.lock"):
        child.start()
        time.sleep(0.3)  # the child waits for the lock
        assert child.is_alive()
    child.join(10)
    exitcode = child.exitcode
    child.kill()
    assert exitcode == 0
