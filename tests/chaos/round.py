"""One round: a disturbed run in a folder of its own, its starts, and the checks after each of them."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.compare import check_error, check_killed, check_success
from tests.chaos.findings import HANG, LEFT, Finding, Outcome
from tests.chaos.processes import Start, kill_all, wait_until_gone
from tests.chaos.site import Site

_SHARED_MEMORY = Path("/dev/shm")
_TEMPORARY = (".tmp", ".part", ".staging", ".uploads")
# Lock files of MLflow, which it never removes; compiled caches of torch.
_ALLOWED = ("db_init_lock-", "torchinductor_")


class Round:
    """State of a round. Every random choice comes from ``rng``, which depends on seed, kind and number only."""

    def __init__(self, site: Site, kind: str, number: int, seed: int) -> None:
        self.site, self.outcome = site, Outcome(kind, number)
        self.rng = random.Random(f"{seed}/{kind}/{number}")
        self.folder = site.folder / f"{kind}-{number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.name = f"{os.getpid()}-{kind}-{number}"
        self.tag = f"{self.name}/"
        self.run_dir = self.folder / "run"
        self._shared = _shared_names()

    def start(self, command: Sequence[str], **env: str) -> Start:
        """Start a command with additional variables."""
        self.outcome.starts += 1
        log = self.folder / f"log-{self.outcome.starts}.txt"
        tag = f"{self.tag}{self.outcome.starts}/"
        return Start(list(command), self.site.environment(self.folder, **env), log, tag)

    def found(self, findings: Sequence[Finding]) -> None:
        """Add findings."""
        self.outcome.findings += findings

    def must_succeed(self, start: Start) -> bool:
        """Wait for the end of a start that must succeed; whether it did."""
        code, output = self._end(start), start.output
        problems = [] if code is None else check_success(code, output)
        self.found(problems)
        return code == 0 and not problems

    def must_fail(self, start: Start, codes: tuple[int, ...], words: str, or_succeed: bool = False) -> None:
        """Wait for the end of a start that must end with one of these exit codes and an error line; ``or_succeed``: or
        with 0, because the fault came too late to matter."""
        code = self._end(start)
        if code == 0 and or_succeed:
            self.found(check_success(code, start.output))
        elif code is not None:
            self.found(check_error(code, start.output, codes, words))

    def was_killed(self, start: Start) -> None:
        """Wait for the end of a start of which a process was killed: all of its processes must end soon."""
        if self._end(start, killed=True) is not None:
            self.found(check_killed(start.output))

    def close(self) -> None:
        """After the last start: nothing may be left of any start of the round."""
        if left := wait_until_gone(self.tag, 10):
            self.found([Finding(LEFT, f"processes: {', '.join(f.role for f in left)}", len(left))])
        if names := sorted(_shared_names() - self._shared):
            self.found([Finding(LEFT, f"{len(names)} files in {_SHARED_MEMORY}, e.g. {names[0]}")])
        temporary = [p.name for p in (self.folder / "tmp").iterdir() if not p.name.startswith(_ALLOWED)]
        if temporary:
            self.found([Finding(LEFT, f"{len(temporary)} files in $TMPDIR, e.g. {sorted(temporary)[0]}")])
        if stale := [p for p in self.folder.rglob("*") if p.name.startswith(".") and p.name.endswith(".tmp")]:
            self.found([Finding(LEFT, f"{len(stale)} temporary files, e.g. {stale[0]}")])
        if stale := [p for p in self.folder.rglob("*") if ".staging" in p.name or p.suffix == ".part"]:
            self.found([Finding(LEFT, f"{len(stale)} incomplete files, e.g. {stale[0]}")])

    def abort(self) -> None:
        """End every process of the round."""
        kill_all(self.tag)

    def _end(self, start: Start, killed: bool = False) -> int | None:
        code = start.wait(self.site.limit_s)
        if code is None:
            self.found(
                [Finding(HANG, f"start {self.outcome.starts} did not end within {self.site.limit_s:.0f} s")]
            )
            return None
        began = time.monotonic()
        if left := wait_until_gone(start.tag, self.site.limit_s if killed else 30):
            roles = ", ".join(f.role for f in left)
            waited = time.monotonic() - began
            self.found(
                [Finding(HANG, f"{roles}: still there {waited:.0f} s after the launcher ended", len(left))]
            )
        return code


def _shared_names() -> set[str]:
    return {p.name for p in _SHARED_MEMORY.iterdir()}
