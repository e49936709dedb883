"""benchmarks/operations.py counts operations as stated, and its check names a bound that does not hold."""

from __future__ import annotations

from unittest import mock

import torch

from benchmarks.operations import OperationCount, Row, main
from maestro_scale.model import cast

CASE = ["--check", "--no-optimizer", "--datasets", "treesatai_ts", "--sizes", "base", "--precisions", "bf16"]


def test_views_and_allocations_are_not_counted_and_the_gradient_of_a_slice_counts_twice():
    x, other = torch.ones(4, 3, requires_grad=True), torch.ones(4, 3)
    with OperationCount() as count:
        count.phase = "forward"
        total = (x[1:].unsqueeze(0) * 2).sum()
        other.t().reshape(12)  # one copy, because the transposed tensor is not contiguous
        torch.empty(3)
        count.phase = "backward"
        total.backward()
    assert count.of_phase("forward") == 3  # mul, sum, clone
    # ones_like (the gradient of the loss), mul, slice_backward (twice)
    assert count.of_phase("backward") == 4


def test_a_row_has_a_problem_if_it_exceeds_its_bound():
    assert Row("case", 7, 7).problem is None
    assert Row("case", 8, None).problem is None
    assert Row("case", 8, 7).problem == "case: 8 operations, at most 7 are allowed"


def test_a_micro_batch_of_the_base_model_has_30_percent_fewer_operations(capsys):
    assert main(CASE) == 0
    assert "all bounds hold" in capsys.readouterr().out
    with mock.patch.object(cast, "cast_together", list):  # as before: one operation per parameter
        assert main(CASE) == 1
    assert "treesatai_ts base bf16: " in capsys.readouterr().out.splitlines()[-1]
