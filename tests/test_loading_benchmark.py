"""benchmarks/loading and benchmarks/object_store: the comparison prepares the same tensors and counts what it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.loading.data import layout_of
from benchmarks.loading.ours import _reads
from benchmarks.loading.prepare import Layout, Preparation, SensorLayout, TargetLayout, views
from benchmarks.object_store import bare, read_all
from benchmarks.slow_store import requests_since, serve
from maestro_scale import datasets
from maestro_scale.shards.format.codec import encode_fields
from maestro_scale.stream.packing import num_bytes
from maestro_scale.stream.transform import Transform

S2 = SensorLayout("s2", 2, 1, (), 10.0, 4, 2, "int16", 3, True, 0.0)
CROPS = TargetLayout("target.crops", (2,), "float32", 10.0, 4, 2, "target.map", (0, 7))
MAP = TargetLayout("target.map", (2, 2), "uint8", 10.0, 4, 2, "", ())


def fields() -> dict[str, np.ndarray]:
    """Five dates whose pixels are 100 × date + position; dates 1 and 4 are cloudy."""
    mask = np.zeros((5, 1, 4, 4), np.uint8)
    mask[[1, 4]] = 90
    return {
        "s2": (100 * np.arange(5)[:, None, None, None] + np.arange(16).reshape(4, 4)).astype(np.int16),
        "s2.dates": np.arange(15, dtype=np.int16).reshape(5, 3),
        "s2.mask": mask,
        "ref_date": np.array([2020, 1, 2], np.int16),
        "target.map": np.full((4, 4), 7, np.uint8),
    }


def test_views_of_a_stored_sample_are_its_arrays():
    found = views(encode_fields("key", fields()))
    assert found.keys() == fields().keys()
    assert all(np.array_equal(found[n], a) and found[n].dtype == a.dtype for n, a in fields().items())


def test_the_preparation_draws_a_clear_date_of_each_bin_and_one_crop():
    layout = Layout((S2,), (CROPS, MAP), 3, 10.0, 2)
    prepare = Preparation(layout)
    for _ in range(20):
        batch = prepare([fields(), fields()])
        for pixels, days in zip(batch["s2"], batch["s2.dates"], strict=True):
            first, second = (pixels // 100).reshape(2, -1)[:, 0]  # bins {0, 1}, {2, 3} or {1, 2}, {3, 4}
            assert (first, second) in {(0, 2), (0, 3), (2, 3)}
            assert days[:, 0].tolist() == [3 * first, 3 * second]
            place = np.sort(pixels[0].reshape(-1) % 100)
            assert place.tolist() == [
                place[0] + i for i in (0, 1, 4, 5)
            ]  # 2 × 2 neighbours, in any orientation
        assert batch["target.crops"].tolist() == [[0, 1], [0, 1]]
        assert batch["target.map"].shape == (2, 2, 2)
    assert prepare.num_bytes() == sum(a.nbytes for a in batch.values()) / 2


@pytest.mark.parametrize("dataset", ["treesatai_ts", "pastis_hd", "flair_hub"])
def test_a_prepared_sample_has_the_bytes_of_ours(dataset):
    spec = datasets.spec(dataset)
    aligned = num_bytes(Transform(spec).fields, 1)
    assert 0 <= aligned - Preparation(layout_of(spec, 4)).num_bytes() < 64 * len(Transform(spec).fields)


def test_the_lower_bound_reads_the_rows_of_a_crop():
    assert list(_reads(Layout((S2,), (), 3, 10.0, 2), 10_000)) == [
        (0, 16),
        (32, 16),
    ]  # 2 of 4 rows of 4 × int16


def test_requests_are_counted(tmp_path: Path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.tar").write_bytes(bytes(range(100)))
    with serve(tmp_path, 0.0, 1e9) as store:
        read = bare(lambda name: f"{store}/bucket/{name}")
        assert read("a.tar", 3, 6) == bytes([3, 4, 5])
        read_all(read, [("a.tar", 0, 40), ("a.tar", 40, 100)])
        seen = requests_since(store)
        assert (seen.get, seen.head, seen.first is None) == (3, 0, False)
        assert requests_since(store).total == 0
