"""Tiles of the shipped datasets as plain folders of GeoTIFF: a description gives what the shipped reader gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from testkit.plain_tiffs import rewrite

from maestro_scale import datasets
from maestro_scale.datasets.description.dataset import open_described
from maestro_scale.datasets.description.load import load_description
from maestro_scale.datasets.spec import DatasetSpec, Tile


def assert_same(tile: Tile, wanted: Tile, spec: DatasetSpec, wanted_spec: DatasetSpec) -> None:
    assert set(tile.arrays) == set(wanted.arrays)
    for name, array in wanted.arrays.items():
        assert tile.arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(tile.arrays[name], array, err_msg=name)
        np.testing.assert_array_equal(tile.dates[name], wanted.dates[name], err_msg=name)
    for name in wanted.masks:
        assert spec.modality(name).mask_bands == wanted_spec.modality(name).mask_bands
        np.testing.assert_array_equal(tile.masks[name], wanted.masks[name], err_msg=name)
    assert list(tile.targets) == list(wanted.targets)
    for name, label in wanted.targets.items():
        assert tile.targets[name].dtype == label.dtype
        np.testing.assert_array_equal(tile.targets[name], label, err_msg=name)
    assert tile.ref_date.tolist() == wanted.ref_date.tolist()
    assert tile.origin == wanted.origin


def compare(name: str, src: Path, dst: Path, split: str, num: int) -> None:
    wanted = datasets.open_raw(name, src, split)
    keys = wanted.keys()[:num]
    description = load_description(rewrite(name, src, dst, keys, split))
    found = open_described(description, str(dst), split)
    assert found.keys() == keys
    for key in keys:
        assert_same(found.read(key), wanted.read(key), found.spec, wanted.spec)


def test_treesatai_ts(synthetic_raw, tmp_path):
    compare("treesatai_ts", synthetic_raw, tmp_path / "plain", "val", 1)


@pytest.mark.parametrize(
    ("name", "tiles"), [("pastis_hd", 1), ("flair_hub", 3), ("flair2", 3), ("s2_naip", 3)]
)
def test_others(name, tiles, tmp_path):
    datasets.synth(name, tmp_path / "raw", tiles, 5)
    split = (
        "train" if tiles > 1 else next(s for s in ("train", "val", "test") if _has(name, tmp_path / "raw", s))
    )
    compare(name, tmp_path / "raw", tmp_path / "plain", split, 1)


def _has(name: str, src: Path, split: str) -> bool:
    try:
        return bool(datasets.open_raw(name, src, split).keys())
    except datasets.DatasetError:
        return False


@pytest.mark.parametrize("name", ["treesatai_ts", "pastis_hd", "flair_hub", "s2_naip"])
def test_tiles_written_by_hand_with_gaps(name, tmp_path, write_tile, write_pastis, write_flair, write_naip):
    write = {
        "treesatai_ts": write_tile,
        "pastis_hd": write_pastis,
        "flair_hub": write_flair,
        "s2_naip": write_naip,
    }[name]
    compare(name, write(), tmp_path / "plain", "train", 1)
