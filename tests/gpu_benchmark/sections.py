"""Sections that misbehave, for tests of the runner. Each stores a value first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.record import load_record


def fine(bench: Bench) -> None:
    bench.record.check("small", 1.0, 2.0)


def beside(bench: Bench) -> None:
    """Ends once ``compiles`` has stored its value: both run at the same time."""
    while load_record(bench.work / "records" / "compiles.json").get("data") != {"first": 1}:
        time.sleep(0.1)


def wrong(bench: Bench) -> None:
    bench.record.check("large", 3.0, 2.0, "too large")


def crashes(bench: Bench) -> None:
    bench.record.put(before=1)
    raise RuntimeError("the last words")


def dies(bench: Bench) -> None:
    bench.record.put(before=1)
    os.abort()


def hangs(bench: Bench) -> None:
    """Also its child, which would hold the GPU."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(bench.work / "child").write_text(str(child.pid))
    bench.record.put(before=1)
    time.sleep(600)


def compiles(bench: Bench) -> None:
    """Runs until it is ended."""
    bench.record.put(first=1)
    time.sleep(600)
