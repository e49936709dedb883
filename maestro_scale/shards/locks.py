"""Locks between processes of one machine. The kernel frees them when a process dies, however it dies."""

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
    """Hold the lock named ``path``; its file goes when it is released.

    Locked if it is taken and not ``wait``; OSError if it cannot be made or locked (:func:`locks_unsupported`).
    """
    descriptor = _acquire(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def open_shared(path: Path) -> int | None:
    """A descriptor that holds a shared lock on a file until it is closed; None if the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def remove_unless_shared(path: Path) -> bool:
    """Delete the file ``path`` unless somebody holds it through :func:`open_shared`; whether it was deleted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
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
    """Whether ``error`` says that a file system has no locks, as some that clusters share."""
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
        # The one who held it has removed the file: lock the file that is there now.
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
