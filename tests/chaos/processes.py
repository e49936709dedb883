"""Real processes of a round: their roles, signals, exit codes and output, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.testkit.runs import REPO

TAG = "CHAOS_ROUND"
"""Environment variable by which all processes of a round are found, also orphans."""
LAUNCHER, WORKER, OTHER = "launcher", "loader worker", "other"
_POLL_S = 0.02
_END_S = 60.0
"""Time in which all processes of a start must end after one of them was killed: DeepSpeed's launcher gives ranks 30 s
between SIGTERM and SIGKILL, and the heartbeat of ranks that lost their launcher takes seconds."""


@dataclass(frozen=True)
class Found:
    """A process of a round."""

    pid: int
    role: str


class Start:
    """One start of a command, the leader of a session, with its output in a file."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path, tag: str) -> None:
        self.command, self.tag, self._log = command, tag, log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                env={**env, TAG: tag},
                cwd=REPO,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """All output so far."""
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether the command has not ended."""
        return self.process.poll() is None

    def wait(self, limit_s: float) -> int | None:
        """The exit code; None if the command has not ended after ``limit_s``, it is then killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(limit_s)
        kill_all(self.tag)
        self.process.wait(30)
        return None


def tagged(tag: str) -> list[Found]:
    """All processes that have not ended, of a start or, by the common beginning of the tags, of a round."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            if not any(v.startswith(f"{TAG}={tag}".encode()) for v in variables):
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":
                continue
            found.append(Found(int(entry.name), _role(words, variables, int(parent))))
        except (OSError, ValueError):
            continue  # it has ended
    return sorted(found, key=lambda f: f.pid)


def of_role(tag: str, role: str) -> list[int]:
    """Process numbers of a role."""
    return [f.pid for f in tagged(tag) if f.role == role]


def send(pids: list[int], number: signal.Signals) -> int:
    """Send a signal; returns how many processes got it."""
    count = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            count += 1
    return count


def kill_all(tag: str) -> None:
    """SIGKILL every process of a round."""
    deadline = time.monotonic() + 30
    while (left := [f.pid for f in tagged(tag)]) and time.monotonic() < deadline:
        send(left, signal.SIGKILL)
        time.sleep(_POLL_S)


def wait_until_gone(tag: str, limit_s: float = _END_S) -> list[Found]:
    """The processes of a round that are left after ``limit_s``; they are then killed."""
    deadline = time.monotonic() + limit_s
    while (left := tagged(tag)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        kill_all(tag)
    return left


def _role(words: list[str], variables: list[bytes], parent: int) -> str:
    command = " ".join(words)
    if "deepspeed.launcher" in command or any(w.endswith("bin/deepspeed") for w in words[:2]):
        return LAUNCHER
    if "resource_tracker" in command:
        return OTHER
    if "multiprocessing.forkserver" in command:
        # The server is a child of the rank, the workers are children of the server.
        return WORKER if b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes() else OTHER
    if "multiprocessing" in command:
        return WORKER
    ranks = [v[5:].decode() for v in variables if v.startswith(b"RANK=")]
    scripts = ("train.py", "evaluate.py", "maestro_scale.cli")
    if any(w.endswith(scripts) for w in words):
        return f"rank {ranks[0] if ranks else 0}"
    return OTHER
