"""Learning-rate search: number of steps, rows and rates of its common schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maestro_scale.evaluation.probes.lr_grid import lr_grid_search

ROWS = np.arange(100, 107)


def run(rows: np.ndarray = ROWS, batch_size: int = 3, seed: int = 0) -> list[list[int]]:
    """The batches of a training with two learners."""
    batches = []
    learners = [[torch.zeros(1, requires_grad=True)] for _ in range(2)]

    def backward(batch: np.ndarray) -> None:
        batches.append(batch.tolist())
        sum(p.sum() for (p,) in learners).backward()

    lr_grid_search(learners, (0.1, 0.01), rows, batch_size, seed, backward)
    return batches


def test_every_epoch_has_every_row_once_in_batches_of_nearly_one_size():
    batches = run()
    # 7 rows in batches of at most 3: sizes 3, 2, 2. Ten epochs are 30 steps, fewer than the least of 300.
    assert len(batches) == 300
    assert [len(b) for b in batches[:6]] == [3, 2, 2, 3, 2, 2]
    assert all(b == sorted(b) for b in batches)
    epochs = [batches[i : i + 3] for i in range(0, 300, 3)]
    assert all(sorted(row for batch in epoch for row in batch) == ROWS.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert run() == batches
    assert run(seed=1) != batches


def test_a_large_split_is_used_for_ten_epochs():
    # 31 batches an epoch make 310 steps.
    batches = run(np.arange(62), 2)
    assert len(batches) == 310
    assert sorted(row for batch in batches for row in batch) == sorted(list(range(62)) * 10)


def test_each_learner_has_its_own_rate():
    # The gradient is 1 at every step, so AdamW moves by the learning rate: rates in the ratio of 10 to 1 move so too.
    learners = [[torch.zeros(1, requires_grad=True)] for _ in range(2)]
    moved = []

    def backward(batch: np.ndarray) -> None:
        sum(p.sum() for (p,) in learners).backward()
        moved.append([p.item() for (p,) in learners])

    lr_grid_search(learners, (0.1, 0.01), ROWS, 3, 0, backward)
    first, last = np.array(moved[1]), np.array([p.item() for (p,) in learners])
    # One-cycle begins at a 25th of the rate.
    np.testing.assert_allclose(first, [-0.1 / 25, -0.01 / 25], rtol=1e-3)
    assert last[0] / last[1] == pytest.approx(10, rel=0.1)
