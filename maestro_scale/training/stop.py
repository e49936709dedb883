"""Stop requests: a signal or a file sets a flag on one rank; all ranks agree on it in the next step."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT, or by a file ``STOP`` in the run directory; ``reason`` says which.

    Loader processes ignore these signals (see ``stream/workers.py``). A second SIGINT interrupts at once. A request
    during the start takes effect after the first step. ``run_dir`` may be set later.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self.reason: str | None = None
        self.run_dir = run_dir
        self.num_polls = 0
        """How often ``requested`` was called: whether a training loop runs that will notice a request."""

    def install(self) -> StopRequest:
        """Install the signal handlers. Call it before slow imports, so that no signal is lost."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self

    def requested(self) -> bool:
        """Whether this rank has a stop request; cheap enough to call at every step."""
        self.num_polls += 1
        file = self._file()
        if self.reason is None and file is not None and file.exists():
            self.reason = f"the file {file}"
        return self.reason is not None

    def clear_file(self) -> None:
        """Remove the STOP file after the stop, so that the next start does not stop again."""
        if (file := self._file()) is not None:
            file.unlink(missing_ok=True)

    def _file(self) -> Path | None:
        return self.run_dir / "STOP" if self.run_dir else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
