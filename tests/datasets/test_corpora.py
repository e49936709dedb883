"""The descriptions of public corpora: ``shard`` of a few tiles in each layout, against values computed by hand."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from testkit import corpora
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.datasets.description.load import load_description
from maestro_scale.recipe import load_recipe
from maestro_scale.shards import as_webdataset
from maestro_scale.training.dry_run import dry_run

REPO = Path(__file__).parents[2]
DESCRIPTIONS = sorted((REPO / "descriptions").glob("*.yaml"))
Tiles = Mapping[str, Mapping[str, np.ndarray]]
L2A_OF_10 = [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]  # of the 12 bands, those that sensors use


@pytest.mark.parametrize("path", DESCRIPTIONS, ids=lambda path: path.stem)
def test_description_is_valid(path):
    # ssl4eo_s12_zarr is another version of a dataset: it keeps the name of it, as its shards fit the same recipe.
    assert load_description(path).name == path.stem.removesuffix("_zarr")


def test_page_lists_every_description():
    page = (REPO / "docs" / "corpora.md").read_text()
    for path in DESCRIPTIONS:
        assert f"| [`{path.stem}`](#" in page


def test_pip_installs_the_descriptions():
    assert (
        '"share/maestro_scale/descriptions" = ["descriptions/*.yaml", "descriptions/*.schema.json"]'
        in (REPO / "pyproject.toml").read_text()
    )


def planned(name: str) -> str:
    """What the dry run of a recipe prints for 8 ranks."""
    output = io.StringIO()
    dry_run(load_recipe(REPO / "recipes" / f"{name}.yaml"), 8, Console(file=output, width=110))
    return output.getvalue()


@pytest.mark.parametrize("name", ["terramesh", "ssl4eo_s12"])
def test_dry_run_of_a_recipe_needs_no_data(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MAESTRO_DATA", str(tmp_path))
    output = planned(name)
    for words in ("s2", "s1_grd", "dem", "parameters", "GFLOP", "GiB per rank"):
        assert words in output


@pytest.fixture
def shard(tmp_path, monkeypatch) -> Callable[..., Tiles]:
    """``shard(name, src, split, …)``: the tiles that the command writes to ``$MAESTRO_DATA/{name}``, by key."""
    monkeypatch.setenv("MAESTRO_DATA", str(tmp_path / "data"))

    def run(name: str, src: Path, split: str = "train", *options: str) -> Tiles:
        dst = tmp_path / "data" / name
        command = ["shard", name, str(src), str(dst), "--split", split, "--workers", "1", *options]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        tiles = list(as_webdataset(str(dst), split))
        return {tile["__key__"]: tile for tile in tiles}

    return run


def day(text: str) -> tuple[int, int, int]:
    """Year, day of year and hour of an ISO date."""
    date = np.datetime64(text, "h")
    year = date.astype("datetime64[Y]")
    return (
        int(year.astype(int)) + 1970,
        int((date.astype("datetime64[D]") - year.astype("datetime64[D]")).astype(int)) + 1,
        int((date - date.astype("datetime64[D]")).astype(int)),
    )


def check_image(tile: Mapping[str, np.ndarray], name: str, values: np.ndarray, dates: list[str]) -> None:
    stored = tile[name]
    np.testing.assert_array_equal(stored, values.astype(stored.dtype))
    assert tile[f"{name}.dates"].tolist() == [list(day(d)) for d in dates]


def check_optical_mask(tile: Mapping[str, np.ndarray], num_dates: int) -> None:
    """Clouds of :func:`corpora.clouds`: 3 to 5 are cloud, 2 is snow, and 6 has no value."""
    classes = corpora.clouds(num_dates, 264)
    mask = tile["s2.mask"]
    np.testing.assert_array_equal(mask[:, 0], 100 * np.isin(classes, (3, 4, 5)))
    np.testing.assert_array_equal(mask[:, 1], 100 * (classes == 2))
    np.testing.assert_array_equal(mask[:, 2], 100 * (classes == 6))
    assert mask.shape[1] == 3


def optical(tile: int, num_dates: int) -> np.ndarray:
    """The stored pixels of Sentinel-2: 0 in all bands where the cloud mask says that there is no data."""
    empty = corpora.clouds(num_dates, 264)[:, None] == 6
    return np.where(empty, 0, corpora.pixels(tile, num_dates, 12, 264))


def test_copernicus_pretrain(shard, tmp_path):
    keys = corpora.write_copernicus_pretrain(tmp_path / "src")
    tiles = shard("copernicus_pretrain", tmp_path / "src")
    assert sorted(tiles) == sorted(key.replace("/", "_") for key in keys)
    first, second = (tiles[key.replace("/", "_")] for key in keys)
    optical = ["2022-03-22T17", "2022-11-21T17"]
    check_image(first, "s2", corpora.pixels(0, 2, 13, 264), optical)
    check_image(first, "s1_grd", corpora.decibels(0, 2, 2, 264), ["2022-03-21T00", "2022-11-22T00"])
    check_image(second, "s2", corpora.pixels(1, 2, 13, 264), optical)
    assert "s1_grd" not in second


@pytest.mark.parametrize("number", [1, 2])
def test_flair_toy(shard, tmp_path, number):
    keys = corpora.write_flair1_toy(tmp_path, number)
    tiles = shard(f"flair{number}_toy", tmp_path / f"flair_{number}_toy_dataset")
    assert sorted(tiles) == sorted(keys["train"])
    row, column = np.ogrid[:512, :512]
    tile = tiles["002993"]
    bands = np.stack([(20 * b + row + column) % 256 for b in range(5)])[None]
    check_image(tile, "aerial", bands[:, :4], ["2020-01-01"])
    check_image(tile, "height", bands[:, 4:], ["2020-01-01"])
    # Labels of 1 to 19; those after 12 are "other", the 13th class.
    np.testing.assert_array_equal(tile["target.landcover"], np.minimum((row // 8 + column // 8) % 19, 12))
    assert (
        sorted(shard(f"flair{number}_toy", tmp_path / f"flair_{number}_toy_dataset", "test")) == keys["test"]
    )


def test_flair_hub_toy_needs_no_description(shard, write_flair, tmp_path):
    """Its lists of tiles have many columns; the layout is that of FLAIR-HUB."""
    src = write_flair()
    lists = (src / "train.csv").read_text().split()
    (src / "train.csv").write_text(
        "".join(f"{line},{'x' if i else 'AERIAL_RGBI'}\n" for i, line in enumerate(lists))
    )
    assert sorted(shard("flair_hub", src)) == sorted(lists[1:])


def test_eurosat_ms(shard, tmp_path):
    keys = corpora.write_eurosat(tmp_path)
    order = [0, 1, 2, 3, 4, 5, 6, 7, 12, 8, 9, 10, 11]  # B8A comes last in the files
    for split, number in (("train", 1), ("test", 301)):
        tiles = shard("eurosat_ms", tmp_path, split)
        assert sorted(tiles) == sorted(keys[split])
        for i, kind in enumerate(corpora.EUROSAT_CLASSES):
            tile = tiles[f"{kind}_{number}"]
            assert tile["target.landuse"].tolist() == [i]
        check_image(tile, "s2", corpora.pixels(9, 1, 13, 64)[:, order] + number, ["2017-07-01"])


def test_terramesh(shard, tmp_path):
    keys = corpora.write_terramesh(tmp_path / "TerraMesh")
    tiles = shard("terramesh", tmp_path / "TerraMesh")
    assert sorted(tiles) == sorted(keys)
    for i, key in enumerate(keys):
        tile, subset = tiles[key], key.split("_")[0]
        dates = [corpora.TERRAMESH_TIMES[subset]]
        check_image(tile, "s2", optical(i, 1), dates)
        check_optical_mask(tile, 1)
        own, other = ("s1_rtc", "s1_grd") if subset == "majortom" else ("s1_grd", "s1_rtc")
        check_image(tile, own, corpora.decibels(i, 1, 2, 264), dates)
        assert other not in tile
        check_image(tile, "dem", corpora.elevation(i, 264), dates)  # it has no date of its own
    assert "2 tiles without s1_grd and 2 without s1_rtc" in planned("terramesh")


def test_ssl4eo_s12(shard, tmp_path):
    keys = corpora.write_ssl4eo_s12(tmp_path)
    tiles = shard("ssl4eo_s12", tmp_path)
    assert sorted(tiles) == sorted(keys)
    for i, key in enumerate(keys):
        check_image(tiles[key], "s2", optical(i, 4), corpora.SSL4EO_TIMES)
        check_optical_mask(tiles[key], 4)
        check_image(tiles[key], "s1_grd", corpora.decibels(i, 4, 2, 264), corpora.SSL4EO_RADAR_TIMES)
        check_image(tiles[key], "dem", corpora.elevation(i, 264), corpora.SSL4EO_TIMES[:1])
    assert "100 epochs" in planned("ssl4eo_s12")


def test_ssl4eo_s12_zarr(shard, tmp_path):
    keys = corpora.write_ssl4eo_s12_zarr(tmp_path, "val")
    tiles = shard("ssl4eo_s12_zarr", tmp_path, "val")
    assert sorted(tiles) == sorted(keys)
    for i, key in enumerate(keys):
        check_image(tiles[key], "s2", optical(i, 4), corpora.SSL4EO_TIMES)
        check_optical_mask(tiles[key], 4)
        check_image(tiles[key], "s1_grd", corpora.decibels(i, 4, 2, 264), corpora.SSL4EO_RADAR_TIMES)


@pytest.mark.parametrize(("level", "num"), [("L2A", 2), ("L1C", 1)])
def test_major_tom_sentinel_2(shard, tmp_path, level, num):
    cells = corpora.write_major_tom(tmp_path, f"Core-S2{level}", cells=("922D_249L", "454U_120R")[:num])
    tiles = shard(f"major_tom_s2_{level.lower()}", tmp_path / f"Core-S2{level}")
    assert sorted(tiles) == sorted(cells)
    for i, cell in enumerate(cells):
        for name, num_bands, size in (
            ("s2_10m", 4, 1068),
            ("s2_20m", 6, 534),
            ("s2_60m", 2 + (level == "L1C"), 178),
        ):
            values = corpora.pixels(i, 1, num_bands, size)
            values[0, :, 0, 0] = 0  # nodata in one band, so the pixel is marked
            check_image(tiles[cell], name, values, ["2023-01-19T16"])
            assert np.argwhere(tiles[cell][f"{name}.mask"]).tolist() == [[0, 0, 0, 0]]


def test_major_tom_sentinel_1(shard, tmp_path):
    cells = corpora.write_major_tom(tmp_path, "Core-S1RTC")
    tiles = shard("major_tom_s1_rtc", tmp_path / "Core-S1RTC")
    for i, cell in enumerate(cells):
        linear = corpora.pixels(i, 1, 2, 1068).astype(np.float32) / 8192
        linear[0, :, 0, 0] = np.nan  # nodata in one band, so the pixel is marked
        check_image(tiles[cell], "s1_rtc", linear, ["2023-01-21T05"])
        assert np.argwhere(tiles[cell]["s1_rtc.mask"]).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "folder", "size"), [("mmearth", "data_100k_v001", 128), ("mmearth64", "data_1M_v001_64", 64)]
)
def test_mmearth(shard, tmp_path, name, folder, size):
    keys = corpora.write_mmearth(tmp_path, name=folder, size=size)
    dates = "".join(f"{key},{date}\n" for key, date in zip(keys, corpora.MMEARTH_DATES, strict=True))
    (tmp_path / folder / "tile_dates.csv").write_text(
        f"tile,date\n{dates}"
    )  # docs/corpora.md has the command
    tiles = shard(name, tmp_path / folder)
    assert sorted(tiles) == sorted(keys)
    order = [0, 1, 2, 3, 4, 5, 6, 8, 7, 9, 11, 12]  # B8A before B8 in the file; without B10
    for i, key in enumerate(keys):
        tile, date = tiles[key], [corpora.MMEARTH_DATES[i]]
        check_image(tile, "s2", corpora.pixels(i, 1, 13, size)[:, order], date)
        radar = corpora.decibels(i, 1, 8, size).astype(np.float32)
        check_image(tile, "s1_asc", radar[:, :2], date)
        if i == 2:
            assert "s1_des" not in tile
        else:
            check_image(tile, "s1_des", radar[:, 4:6], date)
        check_image(tile, "dem", corpora.elevation(i, size), date)
        scl = corpora.scene_classes(i, size)
        np.testing.assert_array_equal(tile["s2.mask"][0, 0], 100 * np.isin(scl, [3, 8, 9, 10]))
        np.testing.assert_array_equal(tile["s2.mask"][0, 1], 100 * (scl == 11))
        # Codes 10, 20, … 100 in turn, then 255, which is no label.
        np.testing.assert_array_equal(
            tile["target.worldcover"], np.arange(size * size).reshape(size, size) % 12
        )


def test_a_corpus_can_be_written_in_pieces(shard, tmp_path, monkeypatch):
    keys = corpora.write_ssl4eo_s12_zarr(tmp_path, num_tiles=1)
    for modality in ("S2L2A", "S1GRD"):
        files = tmp_path / "train" / modality
        (files / "ssl4eos12_train_seasonal_data_000102.zarr.zip").write_bytes(b"of another piece")
    monkeypatch.setenv("PIECE", "0000*")
    assert (
        sorted(shard("ssl4eo_s12_zarr", tmp_path, "train_0", "--set", "splits.names.train_0=train")) == keys
    )
