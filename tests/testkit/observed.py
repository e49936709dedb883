"""The trainer in a process whose clock follows its steps, and that writes down when Python's garbage is collected.

``RUN_DIR``: the run's directory. ``STEP_S``: seconds that time.monotonic jumps ahead with each line of metrics.jsonl.
``COLLECTED``: a file that gets a line for each call of gc.collect: "logged steps, whether collection is automatic".
"""

import gc
import os
import queue  # noqa: F401 - these take the real clock with them, as their waiting must not be disturbed
import sys
import threading  # noqa: F401
import time
from pathlib import Path

REAL_MONOTONIC, REAL_COLLECT = time.monotonic, gc.collect


def logged_steps() -> int:
    """Lines of metrics.jsonl."""
    try:
        return (Path(os.environ["RUN_DIR"]) / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def monotonic() -> float:
    # Real time counts for little, so that a busy machine changes nothing; but waits with a deadline still end.
    return 0.01 * REAL_MONOTONIC() + float(os.environ["STEP_S"]) * logged_steps()


def collect(generation: int = 2) -> int:
    with open(os.environ["COLLECTED"], "a") as file:
        file.write(f"{logged_steps()} {gc.isenabled()}\n")
    return REAL_COLLECT(generation)


if __name__ == "__main__":
    time.monotonic, gc.collect = monotonic, collect
    from maestro_scale.train import main
    from maestro_scale.training.distributed import hard_exit

    sys.argv[0] = "train.py"
    hard_exit(main())
