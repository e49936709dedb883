"""Temporary folders: removed at the end, and those of killed processes by the next one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from maestro_scale.shards import temporary
from maestro_scale.shards.locks import Locked, file_lock

OWNER = """
import time
from maestro_scale.shards.temporary import temporary_folder

with temporary_folder() as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_and_its_lock_are_removed_at_the_end(parent):
    with temporary.temporary_folder() as folder:
        (folder / "inside").mkdir()
        assert folder.parent == parent
        assert temporary.remove_abandoned(parent) == 0
        assert folder.exists()
    assert list(parent.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_running_one_is_not(parent):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={**os.environ, "TMPDIR": str(parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = Path(owner.stdout.readline().strip())
    assert temporary.remove_abandoned(parent) == 0
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (folder / "file").exists()
    with temporary.temporary_folder():
        assert not folder.exists()
    assert list(parent.iterdir()) == []


def _nothing() -> None:
    """What a forked process does."""


def test_a_forked_process_does_not_remove_the_folder_of_its_parent(parent, monkeypatch):
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    temporary.use_for_multiprocessing()
    folder = Path(multiprocessing.process.current_process()._config["tempdir"])
    child = multiprocessing.get_context("fork").Process(
        target=_nothing
    )  # it drops the finalizers of its parent
    child.start()
    child.join()
    assert folder.is_dir()
    assert folder.with_name(f"{folder.name}.lock").exists()


def test_links_are_not_followed_and_other_names_are_kept(parent):
    for path in (parent / "target", parent / "maestro-tmp-own", parent / "maestro-scale-x"):
        path.mkdir()
    (parent / "maestro-tmp-link").symlink_to(parent / "target")
    (parent / "maestro-tmp-link.lock").touch()
    assert temporary.remove_abandoned(parent) == 0
    assert sorted(p.name for p in parent.iterdir() if p.is_dir()) == [
        "maestro-scale-x",
        "maestro-tmp-link",
        "maestro-tmp-own",
        "target",
    ]


def test_a_file_system_without_locks_gets_an_ordinary_folder(parent, monkeypatch):
    def refuse(path: Path, wait: bool = True):
        raise OSError("no locks")

    monkeypatch.setattr(temporary, "file_lock", refuse)
    with temporary.temporary_folder() as folder:
        assert folder.is_dir()
    assert list(parent.iterdir()) == []


def test_multiprocessing_uses_such_a_folder_once(parent, monkeypatch):
    from multiprocessing import process, util

    finalizers = []
    monkeypatch.setattr(util, "Finalize", lambda obj, callback, exitpriority: finalizers.append(callback))
    monkeypatch.setitem(process.current_process()._config, "tempdir", None)
    temporary.use_for_multiprocessing()
    temporary.use_for_multiprocessing()
    folder = Path(util.get_temp_dir())
    assert folder.parent == parent
    (close,) = finalizers
    with pytest.raises(Locked), file_lock(Path(f"{folder}.lock"), wait=False):
        pass
    close()
    assert list(parent.iterdir()) == []
