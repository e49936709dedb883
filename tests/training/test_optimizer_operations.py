"""The bounds of benchmarks/optimizer_operations.py: operations of an optimizer step, and no wait before AdamW."""

from __future__ import annotations

import pytest

from benchmarks import optimizer_operations


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_optimizer_step_launches_at_most_3_operations_per_tensor_and_waits_for_nothing(ranks):
    rows = optimizer_operations.rows(ranks)
    assert {(r.stage, r.precision) for r in rows} == set(optimizer_operations.CASES)
    assert optimizer_operations.problems(rows) == []
    # ZeRO 3 on two ranks has the most, 1.7. With DeepSpeed's check of every gradient there were 8 and more.
    assert max(r.per_tensor for r in rows) < 2
