"""Runs a benchmark's own command as the ranks of one machine, on the CPU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from maestro_scale.parent_death import end_with_parent
from maestro_scale.training.distributed import free_port


def run_ranks(command: Sequence[str], ranks: int, log: Path) -> None:
    """Start ``ranks`` processes and wait for them; their output goes to ``log``.

    Raises:
        RuntimeError: one of them failed; the message is the end of their output.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    with log.open("w") as output:
        processes = [
            subprocess.Popen(
                command,
                env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[1],
                preexec_fn=end_with_parent(),
            )
            for r in range(ranks)
        ]
        codes = [p.wait() for p in processes]
    if any(codes):
        raise RuntimeError(log.read_text()[-3000:])
