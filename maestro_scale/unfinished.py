"""Files and folders that are being written into an output folder, until they are complete and get their names.

They are in its hidden folder ``.parts``, so that whatever has a name of its own in the output is whole. What killed
jobs leave there is removed when the output is complete, or by the next job a day later.
"""

from __future__ import annotations

import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

PARTS = ".parts"
_PARTIAL = ".partial-"
_ABANDONED_S = 24 * 3600.0  # age from which a file that is being written is of a killed job


class Unfinished:
    """The unfinished files of an output folder ``out``; ``name``: of those of a job, of several that share it."""

    def __init__(self, out: Path, name: str = "") -> None:
        self.path = out / PARTS / name
        self._out = out

    def new(self, suffix: str = "") -> Path:
        """A path for a file or folder, on the same file system as the others; another one each time."""
        self.path.mkdir(parents=True, exist_ok=True)
        # A random name: with a prefix that of the file could exceed the limit, and other nodes share the folder.
        return self.path / f"{_PARTIAL}{uuid.uuid4().hex}{suffix}"

    def remove_abandoned(self) -> None:
        """Remove what is older than a day; also beside the output's files, where earlier revisions wrote."""
        for folder in (self.path, self._out):
            for path in folder.glob(f"{_PARTIAL}*"):
                with suppress(OSError):  # another rank removes it
                    if time.time() - path.stat().st_mtime > _ABANDONED_S:
                        _remove(path)

    def remove(self) -> None:
        """Everything is complete: remove what killed jobs have left."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # other jobs have files there
            (self._out / PARTS).rmdir()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
