"""Predicted maps as GeoTIFF: georeference, assembled crops, label values."""

from __future__ import annotations

import dataclasses
import resource
import signal
import warnings

import numpy as np
import pytest
import rasterio
from rasterio.errors import NotGeoreferencedWarning

from maestro_scale import datasets
from maestro_scale.datasets.raster_file import new_raster
from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.evaluate import main as evaluate
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.shards.format.codec import Sample, encode
from maestro_scale.shards.write.writer import Writer
from tests.evaluation.conftest import FIELDS, SPLITS, Fields, field_tile


def placed_tile(number: int):
    return dataclasses.replace(
        field_tile(number), origin=GeoOrigin("EPSG:2154", 650_000.0 + 60 * number, 6_700_000.0)
    )


@pytest.fixture(scope="module")
def placed(fields, tmp_path_factory) -> Fields:
    """The fields, each somewhere, but for the last, whose key is a path."""
    shards, first = tmp_path_factory.mktemp("placed") / "shards", 0
    last = sum(SPLITS.values()) - 1
    for split, count in SPLITS.items():
        with Writer(str(shards), FIELDS, split) as writer:
            for number in range(first, first + count):
                lost = dataclasses.replace(field_tile(number), key="../lost/tile")
                writer.add(lost if number == last else placed_tile(number))
        first += count
    return Fields(shards, fields.model)


def test_every_test_tile_is_a_map_on_its_ground(placed, tmp_path):
    asked = [
        f"--recipe={placed.recipe(tmp_path)}",
        f"--checkpoint={placed.model}",
        f"--out={tmp_path / 'out'}",
    ]
    assert evaluate([*asked, "--mode=probe", "--maps"]) == 0
    folder, first = tmp_path / "out" / "probe", SPLITS["train"] + SPLITS["val"]
    numbers = range(first, first + SPLITS["test"])
    names = {n: f"field-{n:03d}.tif" for n in numbers} | {numbers[-1]: "%2E.%2Flost%2Ftile.tif"}
    assert {p.name for p in (folder / "maps").iterdir()} == set(names.values())
    confusion = np.zeros((4, 4), int)
    for number in numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(folder / "maps" / names[number]) as image:
                answer, crs, bounds = image.read(1), image.crs, image.bounds
                assert image.tags()["key"] == (
                    "../lost/tile" if number == numbers[-1] else f"field-{number:03d}"
                )
                assert image.tags(1) == {"class_0": "wood", "class_2": "meadow", "class_3": "lake"}
        if number == numbers[-1]:
            assert (crs, bounds) == (None, (0, -60, 60, 0))
        else:
            west = 650_000 + 60 * number
            assert (crs.to_string(), bounds) == ("EPSG:2154", (west, 6_699_940, west + 60, 6_700_000))
        truth = field_tile(number).targets["cover"]
        assert answer.shape == truth.shape
        counted = np.isin(truth, (0, 2, 3))
        np.add.at(confusion, (truth[counted], answer[counted]), 1)
    assert confusion[np.ix_((0, 2, 3), (0, 2, 3))].tolist() == [
        list(row) for row in EvalResult.load(folder / "results.json").confusion
    ]


def test_labels_of_whole_tiles_have_no_maps(scenes, fields, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: s\ndata:\n  mixture: [{{dataset: scenes, shards: {str(scenes)!r}, split: train}}]\n"
        f"  cache_dir: {str(tmp_path / 'cache')!r}\n  workers: 0\n"
    )
    asked = [
        f"--recipe={recipe}",
        "--baseline=statistics",
        "--mode=probe",
        f"--out={tmp_path / 'out'}",
        "--maps",
    ]
    assert evaluate(asked) == 2
    assert "--maps: species has labels for whole tiles, so there is no map" in capsys.readouterr().err


def test_a_full_disk_is_an_error(tmp_path):
    """GDAL itself writes 8 kB into a file that cannot have more than 4 kB, without an error."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 90, 90)).astype(np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() fails with an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with (
            pytest.raises(OSError, match="File too large"),
            new_raster(
                tmp_path / "map.tif", driver="GTiff", width=90, height=90, count=1, dtype="uint8"
            ) as raster,
        ):
            raster.write(noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_the_georeference_is_stored_with_the_sample():
    tile = placed_tile(3)
    assert Sample(encode(tile)).origin == GeoOrigin("EPSG:2154", 650_180.0, 6_700_000.0)
    assert Sample(encode(field_tile(3))).origin is None


@pytest.mark.parametrize(
    ("name", "crs", "corner"),
    [
        ("treesatai_ts", "EPSG:25832", (400_000.0, 5_800_000.0)),
        ("flair2", "EPSG:2154", None),
    ],
)
def test_readers_return_the_georeference_of_a_tile(name, crs, corner, tmp_path):
    datasets.synth(name, tmp_path / "raw", 1, 0)
    raw = datasets.open_raw(name, tmp_path / "raw", "train")
    origin = raw.read(raw.keys()[0]).origin
    assert origin.crs == crs
    if corner is None:
        (path,) = (tmp_path / "raw").glob("*_LABEL-COSIA/*/*.tif")
        with rasterio.open(path) as image:
            corner = image.bounds.left, image.bounds.top
    assert (origin.west_m, origin.north_m) == pytest.approx(corner)
