"""What tasks say of counts: rows are labels, a class that no label has is undefined and weighs nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.tasks.task import Multilabel, multilabel_answer, task_for
from maestro_scale.model.config import DatasetView
from tests.evaluation.conftest import FIELDS

VIEW = DatasetView(FIELDS.name, FIELDS.sensors, FIELDS.pos_grid, "s2", FIELDS.crop_m)


def test_rows_of_a_confusion_are_labels_and_columns_answers():
    task = task_for(FIELDS, VIEW, FIELDS.crop_m)
    truth = np.array([[0, 0, 0, 1], [1, 1, dense.IGNORED, 1]])
    answer = np.array([[0, 1, 1, 1], [1, 1, 2, 1]])
    counts = dense.tile_confusion(3, answer, truth)
    assert task.confusion(counts) == ((1, 2, 0), (0, 4, 0), (0, 0, 0))
    assert counts[3].tolist() == [0, 0, 1]
    np.testing.assert_allclose(task.per_class(counts), [1 / 3, 4 / 6, np.nan])
    assert task.statistic(counts) == pytest.approx((1 / 3 + 4 / 6) / 2)


def test_a_class_that_no_tile_has_is_undefined_and_not_part_of_a_mean():
    task = Multilabel(Target("kind", "multilabel", ("a", "b", "c"), threshold=0.5))
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    said = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
    answer = multilabel_answer(said, said * 0.9, truth, {})
    per_class = task.per_class(answer.counts.sum(axis=0))
    expected = f1_score(truth, said, average=None, zero_division=0)
    np.testing.assert_allclose(per_class, [*expected[:2], np.nan])
    assert answer.scores["macro_f1"] == pytest.approx(expected[:2].mean())
    assert float(task.statistic(answer.counts.sum(axis=0))) == pytest.approx(
        f1_score(truth, said, average="weighted", zero_division=0)
    )
    wrong = multilabel_answer(said | [False, False, True], said * 0.9, truth, {})
    assert np.isnan(task.per_class(wrong.counts.sum(axis=0))[2])
    assert wrong.scores["macro_f1"] == pytest.approx((expected[:2].sum() + 0) / 3), "answered, so it counts"
