"""Synthetic TreeSatAI-TS: the official layout, deterministic in the seed, atomic, never over other data."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio

from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetError


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    dst = tmp_path_factory.mktemp("synth") / "data"
    datasets.synth("treesatai_ts", dst, 10, seed=3)
    return dst


def test_every_split_reads_without_assumptions(synthetic):
    seen = []
    for split, count in (("train", 7), ("val", 1), ("test", 2)):
        reader = datasets.open_raw("treesatai_ts", synthetic, split)
        assert len(reader.keys()) == count
        for key in sorted(reader.keys()):
            tile = reader.read(key)
            assert all(note.startswith(("s1_asc has ", "s1_des has ")) for note in tile.notes)
            assert tile.targets["species"].sum() == pytest.approx(1.0, abs=1e-3)
            assert 40 <= len(tile.arrays["s2"]) <= 90
            seen.append(tile)
    assert any(np.isnan(t.arrays["s1_asc"]).any() or np.isnan(t.arrays["s1_des"]).any() for t in seen)
    assert any((t.masks["s2"][:, 0] > 0).any() for t in seen), "snow"
    assert any((t.masks["s2"][:, 1] > 0).any() for t in seen), "cloud"
    assert all(len(np.unique(t.dates["s1_des"], axis=0)) < len(t.dates["s1_des"]) for t in seen)


def test_files_have_the_real_layout(synthetic):
    with rasterio.open(next((synthetic / "aerial").iterdir())) as raster:
        assert (raster.count, raster.height, raster.width) == (4, 304, 304)
        assert raster.crs.to_epsg() == 25832
        assert raster.res == pytest.approx((0.2, 0.2))
    with h5py.File(next((synthetic / "sentinel-ts").iterdir())) as file:
        assert {n: file[n].dtype for n in file if "products" not in n} == dict.fromkeys(
            ("sen-1-asc-data", "sen-1-des-data", "sen-2-data", "sen-2-masks"), np.float32
        )
        assert all(file[n].chunks is None for n in file)
        assert isinstance(file["sen-2-products"][0], bytes)


def test_lists_and_json_give_the_same_labels_as_the_csv(synthetic, tmp_path):
    for name in ("aerial", "sentinel-ts", "split", "labels"):
        (tmp_path / name).symlink_to(synthetic / name)
    listed = datasets.open_raw("treesatai_ts", tmp_path, "train")
    csv = datasets.open_raw("treesatai_ts", synthetic, "train")
    assert listed.keys() == csv.keys()
    for key in sorted(csv.keys()):
        np.testing.assert_allclose(listed.read(key).targets["species"], csv.read(key).targets["species"])


def test_same_seed_same_bytes_and_a_tile_does_not_depend_on_their_number(synthetic, tmp_path):
    datasets.synth("treesatai_ts", tmp_path / "again", 3, seed=3)
    datasets.synth("treesatai_ts", tmp_path / "other", 3, seed=4)
    whole, again, other = content(synthetic), content(tmp_path / "again"), content(tmp_path / "other")
    tiles = {n: b for n, b in again.items() if n.startswith(("aerial", "sentinel-ts"))}
    assert len(tiles) == 6
    assert all(whole[n] == b for n, b in tiles.items())
    assert not set(tiles.values()) & set(other.values())


def test_an_interrupted_run_is_incomplete_and_completed_by_the_next(tmp_path, monkeypatch):
    from maestro_scale.datasets.treesatai_ts import synth as treesatai_ts_synth

    written = []

    def stop_at_the_third(path, scene, year):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        original(path, scene, year)

    original = treesatai_ts_synth._write_series
    monkeypatch.setattr(treesatai_ts_synth, "_write_series", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        datasets.synth("treesatai_ts", tmp_path / "cut", 4, seed=1)
    with pytest.raises(DatasetError, match="no split 'train'"):
        datasets.open_raw("treesatai_ts", tmp_path / "cut", "train")
    monkeypatch.undo()
    datasets.synth("treesatai_ts", tmp_path / "cut", 4, seed=1)
    datasets.synth("treesatai_ts", tmp_path / "whole", 4, seed=1)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_folder_of_older_scenes_is_not_completed(tmp_path):
    marker = tmp_path / "old" / "synth.json"
    marker.parent.mkdir()
    marker.write_text('{"dataset": "treesatai_ts", "tiles": 4, "seed": 1, "generator": 1}')
    message = (
        r"old: holds scenes of version 1, which this release \(version 2\) does not write; choose another"
    )
    with pytest.raises(DatasetError, match=message):
        datasets.synth("treesatai_ts", tmp_path / "old", 4, seed=1)
    assert [p.name for p in marker.parent.iterdir()] == ["synth.json"]


def test_other_data_is_not_touched(synthetic, tmp_path):
    (tmp_path / "train.csv").write_text("mine")
    with pytest.raises(DatasetError, match="not an empty folder"):
        datasets.synth("treesatai_ts", tmp_path, 1, seed=0)
    with pytest.raises(DatasetError, match="another synthetic dataset"):
        datasets.synth("treesatai_ts", synthetic, 10, seed=0)
    with pytest.raises(DatasetError, match="tiles starts at 1"):
        datasets.synth("treesatai_ts", tmp_path / "new", 0, seed=0)
    assert (tmp_path / "train.csv").read_text() == "mine"
