"""An evaluation on the simulated device: copies overlap with computing, classifiers run there, results are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("overlap.py")


@pytest.fixture(scope="module")
def found() -> dict:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_results_are_those_of_the_cpu_which_computes_in_fp32_always(found):
    for precision in ("fp32", "auto"):
        assert found[precision]["cpu"]["dtypes"] == ["torch.float32"]
        assert found[precision]["cpu"]["values"] == found["fp32"]["cpu"]["values"]
    assert found["fp32"]["device"]["dtypes"] == ["torch.float32"]
    assert found["fp32"]["device"]["values"] == found["fp32"]["cpu"]["values"]
    assert found["auto"]["device"]["dtypes"] == ["torch.bfloat16"]
    flat = [[v for row in found["auto"][d]["values"] for v in row] for d in ("device", "cpu")]
    assert flat[0] == pytest.approx(flat[1], abs=0.03)
    assert flat[0] != flat[1]


def test_a_batch_is_copied_and_a_result_fetched_on_streams_of_their_own_while_the_device_computes(found):
    log = found["fp32"]["device"]["log"]
    compute, copied, fetched = 0, *sorted({stream for kind, _, stream in log if kind == "copy" and stream})
    events = [(op if kind in ("mark", "sync") else kind, stream) for kind, op, stream in log]

    def queued(number: int) -> list[tuple[str, int]]:
        """One copy of the whole batch; and, after its kernels, one of the result."""
        return [(f"load {number}", compute), ("copy", copied), ("compute", compute), ("copy", fetched)]

    def handed_out(number: int) -> list[tuple[str, int]]:
        """The only wait of a batch, when the next one is queued."""
        return [("event.synchronize", compute), (f"result {number}", compute)]

    assert events == [
        *queued(0),
        *queued(1),
        *handed_out(0),
        *queued(2),
        *handed_out(1),
        *handed_out(2),
    ]


def test_classifiers_compute_on_the_device_and_predict_the_same(found):
    on_cpu, on_device = found["classified"]["cpu"], found["classified"]["device"]
    assert on_device["faults"] == []
    assert on_device == on_cpu


def test_targets_of_a_finetuning_are_made_on_the_device_without_a_copy_or_a_wait(found):
    on_cpu, on_device = found["labelled"]["cpu"], found["labelled"]["device"]
    assert on_device["faults"] == []
    assert on_device["targets"] == on_cpu["targets"]
    assert on_device["terms"] == on_cpu["terms"]
    counted = sum(value != 255 for sample in on_cpu["targets"] for cell in sample for value in cell)
    assert on_cpu["terms"] == [2 * counted]
