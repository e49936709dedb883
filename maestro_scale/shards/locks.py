"""File locks between processes of one machine (flock). The kernel releases them when a process ends, even by SIGKILL.

A lock belongs to the inode, not to the path, and lock files are deleted on release. So after locking, the code checks
that the locked inode is still the one at the path: another process may have deleted or replaced the file while this
one waited. Without the check two processes could each hold "the" lock, on different inodes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Locked(Exception):
    """Another process (or thread) holds the lock."""


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which is created, and deleted on release.

    Locked if it is held by another and ``wait`` is false; OSError if the file cannot be created or the file system
    has no locks (:func:`locks_unsupported`).
    """
    descriptor, owner = _acquire(path, wait), os.getpid()
    try:
        yield
    finally:
        # A forked child has a copy of the descriptor, and may close this context when it ends: the lock is not its own.
        if os.getpid() == owner:
            # Deleted while still locked: deleting it after release could delete the file of the next holder.
            path.unlink(missing_ok=True)
            # Closing alone would leave it locked as long as such a child lives, which may itself wait for it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def open_shared(path: Path) -> int | None:
    """Open a file with a shared lock that lasts until the descriptor is closed; None if the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    # No links left: it was deleted between open and flock.
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def remove_unless_shared(path: Path) -> bool:
    """Delete the file ``path`` unless a process holds it by :func:`open_shared`; whether it was deleted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Exclusive, so that no reader can take its shared lock between this check and the deletion.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(descriptor, path):
            return False
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def locks_unsupported(error: OSError) -> bool:
    """Whether ``error`` says that the file system has no locks, as on some file systems that clusters share."""
    return error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def _acquire(path: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(descriptor)
            raise Locked(str(path)) from error
        except OSError:
            os.close(descriptor)
            raise
        # The previous holder deleted this file on release: lock the one that is at the path now.
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
