"""What the fuzz tests share: the corpus of a target, then random mutations of it in a process of its own.

``MAESTRO_FUZZ_SECONDS``: time for the mutations of each target; CI sets it, without it a run of the tests takes one
second each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SECONDS = float(os.environ.get("MAESTRO_FUZZ_SECONDS", "1"))


def check(target: str, folder: Path, share: float = 1.0) -> None:
    """Fails if an input of the corpus or a mutation ends otherwise than in an expected error, hangs or takes 1 GiB.

    ``share``: of the time; less for targets whose formats another target covers.
    """
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        target,
        "--driver=mutations",
        f"--seconds={share * SECONDS}",
    ]
    command += [f"--artifacts={folder}", f"--seed={os.environ.get('MAESTRO_FUZZ_SEED', '0')}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 300)
    assert result.returncode == 0, result.stderr[-4000:]
    figures = json.loads(result.stdout.splitlines()[-1])[target]
    assert figures["finding"] == ""
    assert figures["executions"] >= len(list((Path("tests/fuzz/corpus") / target).iterdir()))
