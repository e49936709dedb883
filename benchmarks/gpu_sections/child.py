"""Runs one section in its own process; the arguments are entry, record, work folder, seconds, and ``rehearse``."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the section; 0 unless it raises."""
    entry, record_path, work, seconds, *rest = argv
    ends_at = time.time() + float(seconds)
    # After the clock has started: these imports take seconds.
    from benchmarks.gpu_sections.bench import Bench
    from benchmarks.gpu_sections.device import Device
    from benchmarks.gpu_sections.record import Record

    logging.basicConfig(level=logging.WARNING)
    rehearse = rest == ["rehearse"]
    bench = Bench(rehearse, Path(work), Record(Path(record_path), ends_at), Device.detect(rehearse))
    module, function = entry.split(":")
    bench.record.save()
    getattr(importlib.import_module(module), function)(bench)
    bench.record.save()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    from maestro_scale.training.distributed import hard_exit

    hard_exit(status)
