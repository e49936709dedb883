"""Sections that do not need the trainer, on the simulated accelerator. Run as a script: prints JSON.

The simulated device is not called ``cuda``, so what only CUDA offers (profiler, memory statistics) is not run here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from testkit.simulated.tensor import DEVICE, simulation


def main() -> None:
    from benchmarks.gpu_sections import parity, reference
    from benchmarks.gpu_sections.bench import Bench
    from benchmarks.gpu_sections.device import Device
    from benchmarks.gpu_sections.record import Record

    bench = Bench(
        True,
        Path(tempfile.mkdtemp()),
        Record(Path(tempfile.mkdtemp()) / "r.json", time.time() + 600),
        Device(DEVICE),
    )
    found = {}
    for section in (parity, reference):
        bench.record.checks.clear()
        with simulation() as recorder:
            section.run(bench)
        mixes = sorted({str(r) for r in recorder.records if r.kind == "mix"})
        kernels = sum(r.kind == "kernel" for r in recorder.records)
        checks = [dataclasses.asdict(c) for c in bench.record.checks]
        found[section.__name__.rpartition(".")[2]] = {"mixes": mixes, "kernels": kernels, "checks": checks}
        recorder.records.clear()
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
