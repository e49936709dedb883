"""Fuzzing of what runs, checkpoints and models are read from; see test_data.py."""

from __future__ import annotations

import random
import time

import pytest

from tests.fuzz import test_data
from tests.fuzz.__main__ import Runner, read_corpus
from tests.fuzz.kit import check
from tests.fuzz.mutate import mutate
from tests.fuzz.seeds import documents
from tests.fuzz.targets import TARGETS, expected_errors

SHARES = {"results": 1, "counts": 1, "commit": 1, "checkpoint": 1, "model": 1, "run": 1}
SHARES |= {"override": 0.1, "state_index": 0.1, "tensors": 0.1}  # much of these is also read by the others


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARES)
def test_only_expected_errors(target, tmp_path):
    check(target, tmp_path, SHARES[target])


def test_every_target_is_run():
    there = test_data.test_only_expected_errors.pytestmark[0].args[1]
    assert {*SHARES, *there} == TARGETS.keys() == documents().keys()


def test_bugs_slow_inputs_and_memory_are_found(tmp_path):
    def bug(data: bytes) -> None:
        raise KeyError("x")

    def slow(data: bytes) -> None:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    with pytest.raises(KeyError):
        Runner(bug, tmp_path)(b"a")
    assert len(list(tmp_path.iterdir())) == 1
    runner = Runner(slow, tmp_path)
    runner.max_seconds = 0.1
    with pytest.raises(TimeoutError):
        runner(b"b")
    runner = Runner(lambda data: None, tmp_path)
    runner.max_mib = -1
    with pytest.raises(MemoryError):
        runner(b"c")
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="x"), expected_errors():
        raise ValueError("x")


def test_mutations_keep_the_structure():
    rng = random.Random(0)
    kept = 0
    valid = documents()["sample"][1]
    for _ in range(200):
        changed = mutate(valid, rng)
        size = int.from_bytes(changed[:8], "little")
        kept += changed != valid and 0 < size <= len(changed) - 8 and changed[8:9] == b"{"
    assert kept > 60
    assert read_corpus() == []
