"""A SLURM cluster of network namespaces on this machine, driven by its own commands."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).parents[3]
SERVICE = Path(os.environ.get("MAESTRO_SERVICES", REPO.parent / "shared" / "services")) / "slurm"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "pgrep")
GATEWAY = "10.77.0.1"  # address of this machine on the nodes' network


def why_not() -> str | None:
    """The reason why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "SLURM needs root"
    if missing := [n for n in NEEDED if shutil.which(n) is None]:
        return f"SLURM is not installed (apt-get install slurm-wlm munge iproute2): no {', '.join(missing)}"
    if not SERVICE.exists():
        return f"{SERVICE}, which starts a cluster, is not here (MAESTRO_SERVICES)"
    return None


def command(*words: str | Path, check: bool = True) -> str:
    """Standard output of a command."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def wait_until(true: Callable[[], object], timeout_s: float) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, command("sinfo", "-N", "-l", check=False)
        time.sleep(0.1)


@dataclass
class Submitted:
    """A job, and its batch log."""

    id: str
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED …"""
        return self.show("JobState")

    def show(self, name: str) -> str:
        """A field of ``scontrol show job``."""
        found = re.search(rf"\b{name}=(\S*)", command("scontrol", "show", "job", self.id))
        assert found, name
        return found[1]

    def until(self, true: Callable[[], object], timeout_s: float = 120.0) -> None:
        """Wait until it holds. A requeued job, which SLURM delays by two minutes, is started at once."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if self.state == "PENDING" and self.show("Reason") == "BeginTime":
                time.sleep(3)  # slurmd refuses a job that ended in the same second
                command("scontrol", "update", f"JobId={self.id}", "StartTime=now", check=False)
            assert self.show("Reason") != "PartitionConfig", "the cluster cannot run what the job asks for"
            assert time.monotonic() < deadline, (
                f"{self.state} ({self.show('Reason')}) after {timeout_s} s\n{self.text[-4000:]}{self.ranks()}"
            )
            time.sleep(0.1)

    def end(self, timeout_s: float = 180.0) -> str:
        """Wait for the end of the job; its final state."""
        self.until(lambda: self.state not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), timeout_s)
        return self.state

    def started(self, times: int) -> None:
        """Wait until it runs for the ``times``-th time."""
        self.until(lambda: self.state == "RUNNING" and int(self.show("Restarts")) == times - 1)

    def ranks(self) -> str:
        """The ends of the ranks' logs, for a failed assertion."""
        found = re.findall(r"logs of ranks in (.*)", self.text)
        logs = [p for folder in found for p in sorted(Path(folder).glob("*.log"))]
        return "".join(f"\n--- {p}\n{p.read_text(errors='replace')[-1500:]}" for p in logs)


@dataclass
class Cluster:
    """``num_nodes`` nodes, node1 … on 10.77.0.11 …, each with all the CPUs of this machine."""

    num_nodes: int
    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def up(self) -> None:
        # The script reads the CPUs of a node from `nproc`, which respects OMP_NUM_THREADS.
        command("env", "-u", "OMP_NUM_THREADS", SERVICE, "up", str(self.num_nodes))

    def down(self) -> None:
        command("scancel", "--user=root", check=False)
        command(SERVICE, "down", check=False)

    def submit(
        self, script: Path, *words: str | Path, options: tuple[str, ...] = (), **env: str
    ) -> Submitted:
        """``sbatch OPTIONS SCRIPT WORDS`` from the checkout."""
        pattern = self.folder / "job %j.log"
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={pattern}", *options, str(script), *map(str, words)],
            env={**os.environ, "MAESTRO_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **self.env, **env},
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return Submitted(done.stdout.strip(), self.folder / f"job {done.stdout.strip()}.log")

    def pids(self, node: str) -> list[int]:
        """Processes of a node."""
        return [int(pid) for pid in command("ip", "netns", "pids", node).split()]

    def send(self, number: signal.Signals, node: str, word: str) -> None:
        """Send a signal to the node's processes whose command line contains ``word``."""
        for pid in self.pids(node):
            try:
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, number)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def crash(self, node: str) -> None:
        """Kill all processes of the node with its slurmd, and mark it down (the controller notices after 300 s)."""
        for pid in self.pids(node):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crashed")

    def revive(self, node: str) -> None:
        """Start the node's slurmd again and wait for it."""
        start = f"hostname {node} && exec slurmd"
        command("ip", "netns", "exec", node, "unshare", "-u", "sh", "-c", start)
        wait_until(
            lambda: command("sinfo", "-h", "-n", node, "-o", "%T") in ("idle", "mixed", "allocated"), 60
        )
