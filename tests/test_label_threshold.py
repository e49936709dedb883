"""A share equal to a target's threshold is not a label, wherever labels are computed from shares."""

from __future__ import annotations

import numpy as np
import pytest

from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.evaluation.oracle.oracle import _class_scores
from maestro_scale.shards.format.codec import Sample, encode_fields
from maestro_scale.shards.format.statistics import count_sample
from maestro_scale.tracking.tile_picture import _subtitle

TARGET = Target("trees", "multilabel", ("oak", "beech", "pine"), threshold=0.25)
SPEC = DatasetSpec("toy", "Toy", 10.0, 10.0, 12, (), (TARGET,), ())


@pytest.fixture(scope="module")
def sample() -> Sample:
    shares = np.array([0.25, 0.5, 0.25], np.float32)
    return Sample(encode_fields("a", {"target.trees": shares, "ref_date": np.array([2020, 1, 0], np.int16)}))


def test_statistics_of_a_dataset(sample: Sample):
    assert count_sample(sample, SPEC) == {"class/trees/1": 1}


def test_scores_of_the_oracle():
    scores = _class_scores(np.array([0.25, 0.5, 0.0]), 0.25)
    np.testing.assert_allclose(scores, [0.5, 0.75, 0.0], atol=1e-8)
    assert (scores > 0.5).tolist() == [False, True, False]


def test_caption_of_a_tile(sample: Sample):
    assert _subtitle(sample, SPEC).endswith("trees: beech 50 %")
