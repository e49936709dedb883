"""``maestro-scale shard`` with a description: shards, parts, bad input, names."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from testkit.described import pixels, raster, write_tif, write_yaml
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.entry import run_command
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.preview import read_first_sample
from maestro_scale.shards.read.verify import verify

TILES = 12


@pytest.fixture
def src(tmp_path) -> Path:
    """Twelve tiles with two dates of two bands in files of their own; no file of damage."""
    for i in range(TILES):
        for day in ("20200101", "20200301"):
            for band in ("B02", "B03"):
                write_tif(tmp_path / f"src/t{i:02d}/{day}_{band}.tif", pixels(1, fill=i), west=80.0 * i)
    bands = [{"name": "B2", "from": "B02"}, {"name": "B3", "from": "B03"}]
    write_yaml(tmp_path / "my.yaml", {"s2": raster("{key}/{date:%Y%m%d}_{band}.tif", bands, series=True)})
    return tmp_path / "src"


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of ``maestro-scale shard``."""
    monkeypatch.setattr("sys.argv", ["maestro-scale", "shard", *map(str, arguments)])
    try:
        code = run_command(app, rank=0)
    except SystemExit as end:  # of typer, after success
        code = int(end.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture
def shard(monkeypatch, capsys, src, tmp_path):
    return lambda *more, dst=tmp_path / "out": run(
        monkeypatch, capsys, tmp_path / "my.yaml", src, dst, "--split", "train", "--workers", 1, *more
    )


def test_a_description_gives_shards(shard, tmp_path):
    code, out, _ = shard()
    assert code == 0
    assert out.startswith("12 samples in 1 shards")
    manifest = Manifest.load(str(tmp_path / "out"))
    assert (manifest.spec.name, manifest.spec.modality("s2").quantity) == ("tiny", "any")
    assert verify(str(tmp_path / "out")) == []
    sample = read_first_sample(str(tmp_path / "out"), manifest.shards[0])
    fill = int(sample.key.removeprefix("t"))
    np.testing.assert_array_equal(
        sample.array("s2"), np.stack([np.concatenate([pixels(1, fill=fill)] * 2)] * 2)
    )


def test_set_changes_a_key(shard, tmp_path):
    assert shard("--set", "rasters.s2.dtype=float32", "--set", "name=other")[0] == 0
    assert Manifest.load(str(tmp_path / "out")).spec.modality("s2").dtype == "float32"
    code, _, error = shard("--set", "rasters.s2.dtyp=float32")
    assert code == 2
    assert "--set: rasters.s2.dtyp: unknown key (did you mean 'dtype'?)" in error


def test_parts_equal_one_call_and_a_changed_list_is_named(shard, src, tmp_path):
    assert shard()[0] == 0
    for part in ("2/2", "1/2"):
        assert shard("--part", part, dst=tmp_path / "parts")[0] == 0
    whole, parts = (Manifest.load(str(tmp_path / name)) for name in ("out", "parts"))
    assert whole == parts
    (src / "t11/20200101_B02.tif").rename(src / "t11/2020_B02.tif")
    (src / "t11/20200301_B02.tif").unlink()
    (src / "t11/20200101_B03.tif").unlink()
    (src / "t11/20200301_B03.tif").unlink()
    code, _, error = shard("--part", "2/2", dst=tmp_path / "parts")
    assert (code, "already contains split 'train', with other tiles or settings" in error) == (2, True)


@pytest.mark.parametrize("change", ["rasters.s2.offset=-500", "rasters.s2.nodata=[5]", "rasters.s2.scale=2"])
def test_shards_of_another_description_are_not_taken_for_those_of_this_one(shard, tmp_path, change):
    assert shard()[0] == 0
    code, _, error = shard("--set", change)
    assert (code, "already contains split 'train', with other tiles or settings" in error) == (2, True)


def test_bad_tiles_are_counted_by_kind_with_the_first_example(shard, src, tmp_path):
    (src / "t03/20200101_B02.tif").write_bytes(b"damaged")
    (src / "t05/20200101_B02.tif").write_bytes(b"")
    (src / "t07/20200301_B03.tif").unlink()
    write_tif(src / "t09/20200301_B03.tif", pixels(1, size=4))
    code, out, _ = shard()
    assert code == 0
    assert out.startswith("8 samples")
    lines = [line.strip() for line in out.splitlines() if "left out" in line]
    assert len(lines) == 3
    assert any(line.startswith("2 tiles: left out: cannot be read (first: ") for line in lines)
    assert any("1 tiles: left out: a band is missing" in line and "t07" in line for line in lines)
    assert any("1 tiles: left out: an image of another size" in line and "t09" in line for line in lines)
    code, _, error = shard("--strict", dst=tmp_path / "strict")
    assert code == 2
    assert error.count("error:") == 1
    assert not list((tmp_path / "strict").glob("*.tar"))
    assert not (tmp_path / "strict/manifest.json").exists()


def test_nothing_is_written_where_no_tile_can_be_read(shard, tmp_path):
    code, _, error = shard("--set", "rasters.s2.resolution_m=20", "--set", "rasters.s2.sensor.patch=2")
    assert code == 2
    assert "none of its tiles can be read, nothing is written; the first: " in error
    assert "has 8×8 pixels, expected 4×4 (tile_m / resolution_m)" in error
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not (tmp_path / "out/manifest.json").exists()


def test_each_kind_is_told_where_no_tile_can_be_read(shard, src, monkeypatch):
    for i in range(TILES):
        (src / f"t{i:02d}/20200101_B02.tif").write_bytes(b"damaged")
    (src / "t03/20200101_B02.tif").unlink()
    code, _, error = shard()
    first, *lines = error.splitlines()
    assert (code, first) == (2, "error: split train: none of its tiles can be read, nothing is written")
    assert lines[0].startswith("  11 tiles: cannot be read (first: ")
    assert lines[1].startswith("  1 tiles: a band is missing (first: ")
    assert "t03" in lines[1]
    monkeypatch.setattr("maestro_scale.shards.write.writer._PROBED_FAILURES", 2)
    code, _, error = shard()
    assert code == 2
    assert "none of the first 2 of 12 tiles can be read, nothing is written" in error


def test_unknown_names_and_splits(shard, src, tmp_path, monkeypatch, capsys):
    code, _, error = run(monkeypatch, capsys, "teramesh", src, tmp_path / "x", "--split", "train")
    assert (code, "did you mean 'terramesh'?" in error) == (2, True)
    code, _, error = run(monkeypatch, capsys, tmp_path / "mi.yaml", src, tmp_path / "x", "--split", "train")
    assert (code, "did you mean 'my.yaml'?" in error) == (2, True)
    code, _, error = run(
        monkeypatch, capsys, "treesatai_ts", src, tmp_path / "x", "--split", "train", "--set", "a=1"
    )
    assert (code, "--set changes a description" in error) == (2, True)
    code, _, error = run(monkeypatch, capsys, tmp_path / "my.yaml", src, tmp_path / "x", "--split", "val")
    assert (code, "all tiles are in 'train'" in error) == (2, True)
    code, _, error = run(
        monkeypatch, capsys, tmp_path / "my.yaml", tmp_path / "none", tmp_path / "x", "--split", "train"
    )
    assert (code, "no file matches" in error) == (2, True)
    assert not (tmp_path / "x").exists()


def test_a_missing_library_is_named(shard, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setitem(sys.modules, "rasterio.errors", None)
    code, _, error = shard()
    assert (code, error.splitlines()[-1]) == (
        2,
        "error: reading these files needs rasterio: pip install 'maestro-scale[geo]'",
    )


def test_describe_prints_the_schema():
    done = CliRunner().invoke(app, ["describe", "--schema"])
    assert done.exit_code == 0
    assert '"title": "Description"' in done.output
