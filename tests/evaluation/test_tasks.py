"""Evaluation tasks: scores from counts, and labels against thresholds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from testkit.models import noise_batch, small_config

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.tasks.losses import MultilabelLoss
from maestro_scale.evaluation.tasks.maps import resample_tokens
from maestro_scale.evaluation.tasks.subset import class_weights
from maestro_scale.evaluation.tasks.task import (
    MultilabelTask,
    multilabel_predictions,
    task_for,
)
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.source import Source
from tests.evaluation.conftest import FIELDS, field_tile


def test_rows_of_a_confusion_are_labels_and_columns_predictions():
    task = task_for(FIELDS)
    truth = np.array([[0, 0, 0, 1], [1, 1, dense.IGNORED, 1]])
    answer = np.array([[0, 1, 1, 1], [1, 1, 2, 1]])
    counts = dense.tile_confusion(3, answer, truth)
    assert task.confusion(counts) == ((1, 2, 0), (0, 4, 0), (0, 0, 0))
    assert counts[3].tolist() == [0, 0, 1]
    np.testing.assert_allclose(task.per_class(counts), [1 / 3, 4 / 6, np.nan])
    assert task.statistic(counts) == pytest.approx((1 / 3 + 4 / 6) / 2)


def test_a_class_that_no_tile_has_is_undefined_and_not_part_of_a_mean():
    task = MultilabelTask(Target("kind", "multilabel", ("a", "b", "c"), threshold=0.5))
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    predicted = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
    answer = multilabel_predictions(predicted, predicted * 0.9, truth, {})
    per_class = task.per_class(answer.counts.sum(axis=0))
    expected = f1_score(truth, predicted, average=None, zero_division=0)
    np.testing.assert_allclose(per_class, [*expected[:2], np.nan])
    assert answer.scores["macro_f1"] == pytest.approx(expected[:2].mean())
    assert float(task.statistic(answer.counts.sum(axis=0))) == pytest.approx(
        f1_score(truth, predicted, average="weighted", zero_division=0)
    )
    wrong = multilabel_predictions(predicted | [False, False, True], predicted * 0.9, truth, {})
    assert np.isnan(task.per_class(wrong.counts.sum(axis=0))[2])
    assert wrong.scores["macro_f1"] == pytest.approx((expected[:2].sum() + 0) / 3), "answered, so it counts"


def test_a_share_equal_to_the_threshold_is_no_label(tmp_path):
    target = Target("kind", "multilabel", ("a", "b", "c"), threshold=0.25)
    shares = np.array([0.25, 0.2500001, 0.0], np.float32)
    batch = noise_batch(small_config(), 1)
    batch.targets["kind"] = torch.from_numpy(shares[None])
    assert MultilabelTask(target).labels(batch).tolist() == [[False, True, False]]
    # Nor is it where a fraction of the labels is drawn.
    spec = dataclasses.replace(FIELDS, targets=(target,))
    with Writer(str(tmp_path / "shards"), spec, "train") as writer:
        writer.add(dataclasses.replace(field_tile(0), targets={"kind": shares}))
    store = Store(str(tmp_path / "shards"), tmp_path / "cache", 2**30)
    shards = Manifest.load(str(tmp_path / "shards")).shards_of(["train"])
    source = Source(spec, shards, store)
    assert class_weights(source, target).tolist() == [[0.0, 1.0, 0.0]]


def test_a_probability_of_one_half_is_not_predicted():
    presence = MultilabelLoss(MultilabelTask(Target("kind", "multilabel", ("a", "b"), threshold=0.5)))
    tiles = np.array([[[0.5, 0.5000001], [0.0, 1.0]], [[0.6, 0.4], [1.0, 1.0]]])  # probabilities, then labels
    # Tile 1 answers b, which is there; tile 2 answers a and misses b.
    assert presence.predictions(tiles).counts.astype(int).tolist() == [
        [[0, 1], [0, 0], [0, 0]],
        [[1, 0], [0, 0], [0, 1]],
    ]


def test_wf1_weights_classes_by_their_labels():
    # Class a: 3 hits, 1 false, 1 missed, F1 = 6 / 8 over 4 labels. Class b: 1 hit, 2 missed, F1 = 2 / 4 over 3.
    # Class c: no label, 2 false, F1 = 0. wF1 = (4 * 0.75 + 3 * 0.5) / 7 = 4.5 / 7.
    task = MultilabelTask(Target("kind", "multilabel", ("a", "b", "c")))
    counts = np.array([[3, 1, 0], [1, 0, 2], [1, 2, 0]])
    assert float(task.statistic(counts)) == pytest.approx(4.5 / 7)
    np.testing.assert_allclose(task.per_class(counts), [0.75, 0.5, np.nan])


def test_tokens_of_another_grid_are_interpolated_to_the_reference():
    # Four tokens 0, 2, 4, 6 in a 2 x 2 grid, to 4 x 4: bilinear between centres, constant outside of them.
    found = resample_tokens(torch.tensor([0.0, 2.0, 4.0, 6.0]).view(1, 4, 1), 4).view(4, 4)
    assert found[0].tolist() == [0.0, 0.5, 1.5, 2.0]
    assert found[:, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
