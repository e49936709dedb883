"""Small file systems in memory (tmpfs), to fill up; they need root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.findings import NotRun


class SmallDisk:
    """A mounted tmpfs whose size can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kib: int) -> None:
        """Set the size while it is in use."""
        _run("mount", "-o", f"remount,size={kib}k", str(self.folder))


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[SmallDisk]:
    """Mount a tmpfs of ``kib`` KiB at ``folder``. NotRun if that is not permitted."""
    if os.geteuid() != 0:
        raise NotRun("mounting a tmpfs needs root")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotRun(f"a tmpfs cannot be mounted: {error}") from error
    try:
        yield SmallDisk(folder)
    finally:
        _run("umount", "--lazy", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
