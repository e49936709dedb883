"""The simulated device itself: every kind of synchronisation, mixed operation and race is recorded, and nothing else.

In a process of its own, as everything that uses the simulated device: torch cannot unregister a device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device.cases import EXPECTED

CASES = Path(__file__).with_name("cases.py")


@pytest.fixture(scope="module")
def found() -> dict:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(CASES)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", EXPECTED)
def test_records(case, found):
    assert found["cases"][case] == EXPECTED[case]


def test_a_record_names_phase_file_and_line(found):
    where = [text.partition(" (stream")[0] for text in found["records"]]
    assert where == [
        "forward: sync device to host at maestro_scale/training/step.py:2",
        "forward: sync _local_scalar_dense at maestro_scale/training/step.py:3",
        "log: sync device to host at maestro_scale/training/step.py:2",
        "log: sync _local_scalar_dense at deepspeed/engine.py:2",
    ]
