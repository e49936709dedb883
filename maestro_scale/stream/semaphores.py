"""Names of the loader's semaphores by their owner, and removal of those that killed jobs have left on this node.

A named semaphore is a file in /dev/shm. ``multiprocessing`` removes it when its owner ends, even by SIGKILL, but not
when everything of a job is killed at once: about ten stay for each rank, until the node is restarted. A name of
``multiprocessing`` does not tell whose semaphore it is, so here each process has a prefix, and holds a lock on a file
of that name: the kernel releases it when the process ends, however it ends and in whatever container.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker, synchronize, util
from pathlib import Path
from typing import Any

from maestro_scale.shards.locks import Locked, file_lock

log = logging.getLogger(__name__)

_FOLDER = Path("/dev/shm")
_prefix: tuple[int, str] | None = None  # of this process, with its process id: a fork inherits the variable


def start_tracker() -> None:
    """Start multiprocessing's resource tracker, which removes the semaphores of this process when it is killed.

    Without its warning of "leaked" semaphores: after a kill there are some, it removes them, and its line would be the
    last one in the log, where the cause is looked for.
    """
    option = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(option)  # the tracker is started with these
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(option)


@contextmanager
def owned_semaphores(folder: Path = _FOLDER) -> Iterator[None]:
    """Give the semaphores that are created meanwhile a name that starts with this process's prefix.

    The first call also removes those of processes that have ended. Without /dev/shm nothing changes.
    """
    prefix = _process_prefix(folder)
    if prefix is None:
        yield
        return
    # By this function, not by multiprocessing's `semprefix`: joblib replaces it too, and ignores the prefix.
    kind: Any = synchronize.SemLock
    before = kind._make_name
    kind._make_name = staticmethod(lambda: f"/{prefix}-{secrets.token_hex(4)}")
    try:
        yield
    finally:
        kind._make_name = staticmethod(before)


def remove_abandoned(folder: Path = _FOLDER) -> int:
    """Remove the semaphores of processes of this user that have ended; returns how many there were."""
    count = 0
    for marker in folder.glob("maestro-*.lock"):
        try:
            with file_lock(marker, wait=False):
                for semaphore in folder.glob(f"sem.{marker.stem}-*"):
                    semaphore.unlink(missing_ok=True)
                    count += 1
        except (Locked, OSError):  # it runs; or it belongs to another user
            continue
    return count


def _process_prefix(folder: Path) -> str | None:
    global _prefix
    if _prefix is not None and _prefix[0] == os.getpid():
        return _prefix[1]
    if not folder.is_dir():
        return None
    if count := remove_abandoned(folder):
        log.info("%d semaphores of killed jobs were removed from %s", count, folder)
    prefix = f"maestro-{os.getpid()}-{secrets.token_hex(4)}"
    held = ExitStack()
    try:
        held.enter_context(file_lock(folder / f"{prefix}.lock", wait=False))
    except (Locked, OSError):
        return None
    # Created before the semaphores, so it is removed after them.
    util.Finalize(None, held.close, exitpriority=0)
    _prefix = (os.getpid(), prefix)
    return prefix
