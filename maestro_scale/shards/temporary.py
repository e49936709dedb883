"""Temporary folders that the next process on this node removes if their owner was killed.

The owner of a folder holds a lock on a file beside it, which the kernel releases however the owner ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import process, util
from pathlib import Path

from maestro_scale.shards.locks import Locked, file_lock

_PREFIX = "maestro-tmp-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder in the folder for temporary files, removed at the end. Also removes those of killed processes."""
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    with ExitStack() as stack:
        path = parent / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            # The lock first: a folder without a lock that is held counts as abandoned.
            stack.enter_context(file_lock(_marker(path), wait=False))
            path.mkdir(mode=0o700)
            stack.callback(_remove, path, os.getpid())
        except (Locked, OSError):  # no locks on this file system: an ordinary temporary folder
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maestro-")))
        yield path


def use_for_multiprocessing() -> None:
    """Let ``multiprocessing`` keep the socket of its fork server in such a folder, for the life of this process."""
    # `util.get_temp_dir` reads this; its own folder stays where the process is killed or leaves by `os._exit`.
    config = process.current_process()._config  # type: ignore[attr-defined]  # private: not in typeshed
    if config.get("tempdir") is None:
        stack = ExitStack()
        config["tempdir"] = str(stack.enter_context(temporary_folder()))
        util.Finalize(None, stack.close, exitpriority=0)


def remove_abandoned(parent: Path) -> int:
    """Remove the folders of processes of this user that have ended; returns how many there were."""
    count = 0
    for marker in parent.glob(f"{_PREFIX}*.lock"):
        try:
            if marker.lstat().st_uid != os.getuid():
                continue
            with file_lock(marker, wait=False):
                folder = marker.with_suffix("")
                if folder.is_dir() and not folder.is_symlink():
                    shutil.rmtree(folder, ignore_errors=True)
                    count += 1
        except (Locked, OSError):  # it runs, or another process removes it
            continue
    return count


def _remove(folder: Path, owner: int) -> None:
    # Not in a forked child: multiprocessing drops the finalizers of its parent there, which closes the context.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _marker(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
