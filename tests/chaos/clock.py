"""A wall clock that jumps, for the processes of a round: a library that is preloaded, and a file with the offset."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from tests.chaos.findings import NotRun

_SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """The clock of the processes that are started with ``env``; its offset is set while they run."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("gcc") is None:
            raise NotRun("gcc is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        library, self._offset = folder / "clock.so", folder / "offset"
        if not library.exists():
            command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl", "-pthread"]
            built = subprocess.run(command, capture_output=True, text=True)
            if built.returncode:
                raise NotRun(f"the clock library cannot be built: {built.stderr.splitlines()[0]}")
        self._offset.write_bytes(struct.pack("q", 0))
        self.env = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(self._offset)}

    def jump_to(self, offset_s: float) -> None:
        """Set the difference from the real clock; running processes see it at once."""
        with self._offset.open("r+b") as file:  # in place: the processes have mapped this file
            file.write(struct.pack("q", int(offset_s * 1e9)))
