"""The reader of S2-NAIP against a tile written by hand, against bad input, and from synth to a trained model."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from testkit.runs import Trainer, audit
from testkit.s2_naip_tile import NAIP_PRODUCT, S2_PRODUCTS, TILE, decibels, naip_pixels, stack, write_tif
from typer.testing import CliRunner

from maestro_scale import datasets
from maestro_scale.cli import app
from maestro_scale.datasets.s2_naip.reader import FULL_SPEC, SPEC
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.evaluate import main as evaluate
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.shards.errors import WriteError
from maestro_scale.shards.format.fields import check_tile
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source

EVERYTHING = ("naip", "s2", "s1", "landsat")


def read(src: Path, modalities: tuple[str, ...] | None = None):
    reader = datasets.open_raw("s2_naip", src, "train", modalities)
    tile = reader.read(TILE)
    check_tile(tile, reader.spec)
    return tile


def test_pixels_and_dates_equal_the_files_in_chronological_order(write_naip):
    tile = read(write_naip(), EVERYTHING)
    np.testing.assert_array_equal(tile.arrays["naip"], naip_pixels()[None])
    assert tile.dates["naip"].tolist() == [[2020, 186, 0]]
    assert tile.ref_date.tolist() == [2020, 186, 0]
    assert tile.arrays["s2"].dtype == np.uint16
    np.testing.assert_array_equal(tile.arrays["s2"], stack(3, 10)[[1, 0, 2]])
    assert tile.dates["s2"].tolist() == [[2020, 60, 0], [2020, 61, 0], [2020, 366, 0]]
    assert tile.dates["s1"].tolist() == [[2020, 3, 0], [2020, 184, 0]]
    np.testing.assert_array_equal(tile.arrays["landsat"], stack(1, 11))
    assert tile.dates["landsat"].tolist() == [[2020, 133, 0]]


def test_radar_is_in_decibels_with_nodata_as_nan(write_naip):
    tile = read(write_naip())
    expected = decibels()
    expected[1, 0, 0, 0] = np.nan
    np.testing.assert_array_equal(tile.arrays["s1"], expected)
    assert [n for n in tile.notes if n.startswith("s1 has NaN")]
    assert [n for n in tile.notes if n.startswith("s1 has zeros")]
    assert "s1 has fewer than 4 dates: some are seen twice" in tile.notes


def test_landsat_is_read_only_if_selected(write_naip):
    src = write_naip()
    assert set(read(src).arrays) == {"naip", "s2", "s1"}
    for path in sorted((src / "landsat").iterdir()):
        path.unlink()
    (src / "landsat").rmdir()
    assert set(read(src, ("s1", "s2")).arrays) == {"s1", "s2"}
    with pytest.raises(DatasetError, match="landsat: cannot list the folder"):
        read(src, EVERYTHING)
    with pytest.raises(DatasetError, match="has no modality 'spot'"):
        read(src, ("spot",))


def test_model_inputs_of_a_crop_have_its_bands_and_scale(write_naip, tmp_path):
    """The first crop of the tile: 96 NAIP pixels and 12 Sentinel pixels a side, near-infrared first."""
    url = str(tmp_path / "shards")
    reader = datasets.open_raw("s2_naip", write_naip(s1=-1 - stack(2, 2).astype(np.float32) / 1000), "train")
    manifest = write_shards(reader, url, "train")
    source = Source(
        manifest.spec,
        manifest.shards_of(["train"]),
        Store(url, tmp_path / "c", 10**9),
    )
    batch = next(iter(EvalLoader(source, 1, crops=1)))
    naip = torch.from_numpy(naip_pixels()[:, :96, :96])
    assert torch.equal(batch.pixels["aerial"][0, 0], naip[[3, 0, 1, 2]])
    assert torch.equal(batch.pixels["spot"][0, 0], naip[:3])
    # Three dates stored, sixteen seen: each repeated where it stands; so are the two of the radar.
    seen = batch.dates["s2"][0, :, 1].tolist()
    assert seen == [60] * 6 + [61] * 5 + [366] * 5
    assert batch.pixels["s2"][0, 0, 9].to(torch.int64)[3, 4] == 10_000 + 800 * 9 + 34
    assert batch.dates["s1"][0, :, 1].tolist() == [3, 3, 184, 184]
    assert batch.num_repeated_dates == 13 + 2
    scales = {s.name: (s.scale.kind, s.scale.divisor) for s in SPEC.sensors}
    assert scales == {
        "aerial": ("linear", 255),
        "spot": ("linear", 255),
        "s2": ("linear", 5000),
        "s1": ("linear", 20),
    }
    assert [FULL_SPEC.modality("naip").bands[b] for b in SPEC.sensor("aerial").bands] == [
        "NIR",
        "R",
        "G",
        "B",
    ]


def test_invalid_values_are_corrected_and_noted(write_naip):
    src = write_naip()
    values = stack(3, 10).astype(np.float32)
    values[0, 0, 0, :3] = (12.4, 70_000, np.nan)
    write_tif(src / "sentinel2" / f"{TILE}_stacked.tif", values)
    tile = read(src)
    assert tile.arrays["s2"][1, 0, 0, :3].tolist() == [12, 65_535, 0]
    assert sum(n.startswith("s2 has") and "dates" not in n for n in tile.notes) == 2


def test_the_reader_pickles(write_naip):
    reader = pickle.loads(pickle.dumps(datasets.open_raw("s2_naip", write_naip(), "train")))
    assert reader.read(TILE).key == TILE


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_folder_split_or_column_is_named(write_naip, tmp_path):
    src = write_naip()
    with pytest.raises(DatasetError, match="splits found: train"):
        datasets.open_raw("s2_naip", src, "val")
    (src / "val.csv").write_text("image\nx\n")
    with pytest.raises(DatasetError, match="no column 'name' but image"):
        datasets.open_raw("s2_naip", src, "val")
    (src / "val.csv").write_text("name\nx\n")
    with pytest.raises(DatasetError) as error:
        datasets.open_raw("s2_naip", src, "val")
    assert "none of its 1 tiles has its files" in one_line(error)
    (src / "sentinel1" / f"{TILE}.tif").unlink()
    (src / "sentinel1").rmdir()
    with pytest.raises(DatasetError, match="sentinel1: cannot list the folder"):
        datasets.open_raw("s2_naip", src, "train")


@pytest.mark.parametrize(
    ("folder", "text", "message"),
    [
        ("s2", "", "so the tile has no dates"),
        ("s2", "\n".join(S2_PRODUCTS[:2]), "has 3 dates, dates/s2/.* lists 2"),
        ("s1", "S1A_IW_GRDH_1SDV\nS1A_IW_GRDH_1SDV", "is 'S1A_IW_GRDH_1SDV', not a product name"),
        ("naip", NAIP_PRODUCT.replace("20200704", "20200231"), "not in the calendar"),
        ("naip", f"{NAIP_PRODUCT}\n{NAIP_PRODUCT}", "has 2 products, expected 1"),
    ],
)
def test_invalid_dates_are_named(write_naip, folder, text, message):
    src = write_naip()
    (src / "dates" / folder / f"{TILE}.txt").write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        read(src)
    assert TILE in one_line(error)


def test_bad_tiles_are_skipped_and_counted_by_kind_or_raise(write_naip, tmp_path):
    names = tuple(f"32612_{i}_-6049" for i in range(7))
    src, out = write_naip(names), tmp_path / "shards"
    (src / "dates/s2" / f"{names[0]}.txt").write_text("")
    (src / "dates/s1" / f"{names[1]}.txt").write_text("")
    (src / "sentinel1" / f"{names[2]}.tif").unlink()
    (src / "naip" / f"{names[3]}.png").write_bytes(b"not an image")
    command = ["shard", "s2_naip", str(src), str(out), "--split", "train", "--workers", "1"]
    stopped = CliRunner().invoke(app, [*command, "--strict"])
    assert isinstance(stopped.exception, DatasetError)
    assert not (out / "manifest.json").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "3 samples in 1 shards" in done.output
    manifest = Manifest.load(str(out))
    left_out = {k: n for k, n in manifest.notes.items() if k.startswith("left out")}
    assert left_out == {
        "left out: no dates": 2,
        "left out: a file is missing": 1,
        "left out: cannot be read": 1,
    }
    missing = f"sentinel1/{names[2]}.tif: is missing (1 of 7 tiles in train.csv lack files)"
    assert missing in manifest.examples["left out: a file is missing"]
    assert "2 tiles: left out: no dates (first: " in done.output
    assert manifest.notes["s1 has NaN: filled in from other dates when read"] == 3
    assert manifest.examples["s1 has NaN: filled in from other dates when read"] in names[4:]
    assert verify(str(out)) == []


def test_a_split_without_any_valid_tile_names_the_cause(write_naip, tmp_path):
    src = write_naip()
    (src / "dates/s2" / f"{TILE}.txt").write_text("")
    with pytest.raises(WriteError, match=r"none of its tiles can be read.*so the tile has no dates"):
        write_shards(datasets.open_raw("s2_naip", src, "train"), str(tmp_path / "o"), "train", strict=False)


RECIPE = """
name: tiny-naip
data:
  mixture:
    - dataset: s2_naip
      shards: {shards}
      split: [train, val, test]
      crop_m: 40
      sensors:
        aerial: {{image_size: 32, patch: 16}}
        spot: {{image_size: 32, patch: 16}}
        s2: {{image_size: 4, num_dates: 4}}
        s1: {{image_size: 4, num_dates: 4}}
        landsat: {{image_size: 4, num_dates: 2}}
  lanes: 2
  workers: 0
  cache_dir: {cache}
model: {{size: tiny, width: 32, depth: 2, heads: 2, decoder_depth: 1, decoder_width: 32, inter_depth: 1}}
train: {{steps: 3, global_batch: 4, micro_batch: 2, precision: fp32, log_every: 1, audit: true}}
checkpoint: {{every_steps: 3, keep: 1}}
tracking: {{enabled: false, pictures_every: 0}}
"""


ELSEWHERE = """
name: naip-to-treesatai
data:
  mixture:
    - dataset: treesatai_ts
      shards: {shards}
      sensors:
        aerial: {{image_size: 32, patch: 16}}
        s2: {{num_dates: 4}}
        s1_asc: {{embed: s1, num_dates: 2}}
        s1_des: {{embed: s1, num_dates: 2}}
  cache_dir: {cache}
  workers: 0
"""


@pytest.mark.slow
def test_from_synth_to_a_model_trained_on_two_ranks_and_evaluated_elsewhere(
    tmp_path, synthetic_shards, capsys
):
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    run = CliRunner().invoke
    assert run(app, ["synth", "s2_naip", str(raw), "--tiles", "6", "--seed", "1"]).exit_code == 0
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        options = ["--split", split, "--workers", "1", "--modalities", ",".join(EVERYTHING), "--strict"]
        done = run(app, ["shard", "s2_naip", str(raw), str(shards), *options])
        assert f"{count} samples in" in done.output, done.output
    checked = run(app, ["verify", str(shards)])
    assert checked.exit_code == 0
    assert "6 samples, all valid" in checked.output
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        RECIPE.format(shards=json.dumps(str(shards)), cache=json.dumps(str(tmp_path / "cache")))
    )
    lines = Trainer(recipe).train(tmp_path / "run", 2)
    assert [m["step"] for m in lines] == [1, 2, 3]
    for sensor in ("aerial", "spot", "s2", "s1", "landsat"):
        assert np.isfinite(lines[-1][f"loss/{sensor}"]), sensor
    assert sum(len(keys) for keys in audit(tmp_path / "run").values()) == 12

    def score(recipe: Path) -> tuple[int, str]:
        code = evaluate(
            [f"--recipe={recipe}", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path}", "--mode=knn"]
        )
        return code, "".join(capsys.readouterr())

    assert "s2_naip has no labels, so there is nothing to evaluate" in score(recipe)[1]
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(
        ELSEWHERE.format(shards=json.dumps(str(synthetic_shards)), cache=json.dumps(str(tmp_path / "cache")))
    )
    code, output = score(elsewhere)
    assert (code, "is encoded from aerial, s2, s1_asc, s1_des" in output) == (0, True), output
    # Not wF1: among 28 labelled tiles of classes of equal season, no class may get more than half of the votes.
    assert EvalResult.load(tmp_path / "knn" / "results.json").scores["mean_average_precision"] > 0.1


def test_synthetic_files_have_the_real_layout(tmp_path):
    import rasterio

    datasets.synth("s2_naip", tmp_path, 3, seed=2)
    reader = datasets.open_raw("s2_naip", tmp_path, "train", EVERYTHING)
    (key,) = reader.keys()
    tile = reader.read(key)
    check_tile(tile, reader.spec)
    assert 16 <= len(tile.arrays["s2"]) <= 32
    assert 2 <= len(tile.arrays["s1"]) <= 8
    assert len(tile.arrays["landsat"]) == 4
    assert -30 < np.nanmedian(tile.arrays["s1"]) < -5
    assert all((np.diff(tile.dates["s2"][:, 1]) > 0).tolist())
    with rasterio.open(tmp_path / "sentinel2" / f"{key}_stacked.tif") as raster:
        assert raster.dtypes[0] == "uint16"
        assert raster.bounds.right - raster.bounds.left == 640
        assert raster.crs.to_epsg() == int(key.split("_")[0])
    assert not list(tmp_path.rglob("*.xml"))
