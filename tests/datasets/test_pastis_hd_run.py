"""PASTIS-HD from the command line: from synthetic raw data to a trained model and its score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from testkit.runs import Trainer, audit
from typer.testing import CliRunner

from maestro_scale import datasets
from maestro_scale.cli import app
from maestro_scale.datasets.pastis_hd.reader import CLASSES
from maestro_scale.evaluate import main as evaluate
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.shards.format.fields import check_tile

# Crops of 240 m do not divide the tile: the last ones overlap.
RECIPE = """
name: tiny-pastis
data:
  mixture:
    - dataset: pastis_hd
      shards: {shards}
      split: [train, val]
      crop_m: 240
      sensors:
        spot: {{image_size: 48, patch: 16}}
        s2: {{image_size: 8, num_dates: 4}}
        s1_asc: {{image_size: 8, num_dates: 2, bands: [0, 1, 2], band_groups: [1, 1, 1]}}
        s1_des: {{image_size: 8, num_dates: 2}}
  lanes: 2
  workers: 0
  cache_dir: {cache}
model: {{size: tiny, width: 32, depth: 2, heads: 2, decoder_depth: 1, decoder_width: 32, inter_depth: 1}}
train: {{steps: 3, global_batch: 4, micro_batch: 2, precision: fp32, log_every: 1, audit: true}}
checkpoint: {{every_steps: 3, keep: 1}}
tracking: {{enabled: false, pictures_every: 0}}
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic release of five tiles, one per fold."""
    folder = tmp_path_factory.mktemp("pastis") / "raw"
    done = CliRunner().invoke(app, ["synth", "pastis_hd", str(folder), "--tiles", "5", "--seed", "1"])
    assert done.exit_code == 0, done.output
    return folder


def pixels_of(raw: Path, split: str) -> np.ndarray:
    """(19,) pixels of each class that counts, in a split of one tile."""
    (key,) = datasets.open_raw("pastis_hd", raw, split).keys()
    labels = np.load(raw / f"ANNOTATIONS/TARGET_{key}.npy")[0]
    return np.bincount(labels.reshape(-1), minlength=20)[: CLASSES.index("void")]


@pytest.mark.slow
def test_from_synth_to_a_model_trained_on_two_ranks_and_evaluated(raw: Path, tmp_path: Path, capsys):
    shards, run = tmp_path / "shards", CliRunner().invoke
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        done = run(
            app, ["shard", "pastis_hd", str(raw), str(shards), "--split", split, "--workers", "1", "--strict"]
        )
        assert f"{count} samples in" in done.output, done.output
    checked = run(app, ["verify", str(shards)])
    assert checked.exit_code == 0
    assert "5 samples, all valid" in checked.output
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        RECIPE.format(shards=json.dumps(str(shards)), cache=json.dumps(str(tmp_path / "cache")))
    )
    lines = Trainer(recipe).train(tmp_path / "run", 2)
    assert [m["step"] for m in lines] == [1, 2, 3]
    for sensor in ("spot", "s2", "s1_asc", "s1_des"):
        assert np.isfinite(lines[-1][f"loss/{sensor}"]), sensor
    assert sum(len(keys) for keys in audit(tmp_path / "run").values()) == 12

    common = [f"--recipe={recipe}", f"--checkpoint={tmp_path / 'run'}"]
    code = evaluate([*common, f"--out={tmp_path / 'seg'}", "--mode=knn", "--mode=probe"])
    assert code == 0, "".join(capsys.readouterr())
    for mode in ("knn", "probe"):
        result = EvalResult.load(tmp_path / "seg" / mode / "results.json")
        assert (result.benchmark, result.metric) == ("pastis_hd", "miou")
        # Every pixel of the test tile but void, once, though crops overlap.
        assert np.array(result.confusion).sum(1).tolist() == pixels_of(raw, "test").tolist()
    code = evaluate([*common, f"--out={tmp_path / 'mlc'}", "--mode=knn", "--target=crops_present"])
    assert code == 0, "".join(capsys.readouterr())
    assert EvalResult.load(tmp_path / "mlc" / "knn" / "results.json").metric == "wf1"
    turned = ["--split", "val=test", "test=val", f"--out={tmp_path / 'turned'}", "--mode=knn"]
    assert evaluate([*common, *turned]) == 0, "".join(capsys.readouterr())
    result = EvalResult.load(tmp_path / "turned" / "knn" / "results.json")
    assert np.array(result.confusion).sum(1).tolist() == pixels_of(raw, "val").tolist()
    assert evaluate([*common, "--split", "valid=test", f"--out={tmp_path}"]) == 2
    assert "--split valid=test: expected train=" in capsys.readouterr().err


def test_synthetic_files_have_the_real_layout(raw: Path):
    folds = [datasets.open_raw("pastis_hd", raw, f"fold_{i}").keys() for i in range(1, 6)]
    assert sorted(key for keys in folds for key in keys) == [str(10_000 + i) for i in range(5)]
    assert all(len(keys) == 1 for keys in folds)
    classes = set()
    for split in ("train", "val", "test"):
        reader = datasets.open_raw("pastis_hd", raw, split)
        for key in sorted(reader.keys()):
            tile = reader.read(key)
            check_tile(tile, reader.spec)
            assert tile.notes == ()
            assert 38 <= len(tile.arrays["s2"]) <= 66
            assert len(tile.arrays["s1_asc"]) == len(tile.arrays["s1_des"]) == 67
            assert -30 < np.median(tile.arrays["s1_asc"][:, :2].astype(np.float32)) < -5
            vv, vh, difference = np.moveaxis(tile.arrays["s1_des"].astype(np.float32), 1, 0)
            np.testing.assert_allclose(vv - vh, difference, atol=0.05)
            assert set(tile.dates["s2"][:, 0]) == {2018, 2019}
            classes |= set(np.unique(tile.targets["crop_type"]).tolist())
    assert len(classes) > 12
    assert CLASSES.index("void") in classes
    with rasterio.open(next((raw / "DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019").iterdir())) as raster:
        assert (raster.count, raster.height, raster.width, raster.dtypes[0]) == (3, 1280, 1280, "uint8")
        assert raster.crs.to_epsg() == 2154
        assert raster.res == (1, 1)
    content = json.loads((raw / "metadata.geojson").read_text())
    assert content["features"][0]["properties"]["dates-S2"]["0"] > 20180900
    assert not list(raw.rglob("*.xml"))
