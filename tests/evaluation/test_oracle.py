"""The oracle: accurate on synthetic scenes from the class signatures only, refused for other data."""

from __future__ import annotations

import dataclasses

import numpy as np

from maestro_scale.datasets.pastis_hd.reader import S2_BANDS
from maestro_scale.datasets.synthetic.scene import Scene
from maestro_scale.datasets.synthetic.vegetation import BAND_NM
from maestro_scale.evaluate import main as evaluate
from maestro_scale.evaluation.oracle.oracle import _refine_borders
from maestro_scale.evaluation.oracle.signatures import ReflectanceSeries, unmix
from maestro_scale.evaluation.report.groups import find_results
from maestro_scale.evaluation.report.report import write_report
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.shards.write.writer import Writer
from tests.evaluation.conftest import FIELDS, SCENES, scene_tile

NM = np.array([BAND_NM[b] for b in S2_BANDS], float)


def observed(scene: Scene, days: np.ndarray) -> ReflectanceSeries:
    snow, cloud = scene.weather(days, 10.0)
    return ReflectanceSeries(
        scene.optical(days, S2_BANDS, 10.0, snow, cloud).reshape(len(days), 10, -1), days, NM
    )


def test_shares_of_pixels_are_found_through_clouds_light_and_season():
    errors, shifted = [], []
    for index in range(8):
        scene, days = Scene(5, index, 60.0, 15), np.arange(4, 365, 10)
        truth = scene.fractions(10.0).reshape(15, -1)
        series = observed(scene, days)
        shares, misfit = unmix(series, 15, 0.02)
        np.testing.assert_allclose(shares.sum(axis=0), 1)
        assert misfit < 4
        errors.append(np.abs(shares - truth).sum(axis=0).mean() / 2)
        wrong, _ = unmix(dataclasses.replace(series, days=(days + 50) % 365), 15, 0.02)
        shifted.append(np.abs(wrong - truth).sum(axis=0).mean() / 2)
    assert np.mean(errors) < 0.12  # of a pixel's area
    assert np.mean(shifted) > 0.5, "the dates told it nothing"


def test_aerial_images_sharpen_borders():
    truth = np.zeros((40, 40), int)
    truth[:, 17:] = 1
    rng = np.random.default_rng(0)
    colours = np.array([[0.2, 0.4], [0.3, 0.25], [0.15, 0.15]])
    light = 1 + 0.3 * rng.standard_normal((40, 40))[None].clip(-1, 1)
    logs = np.log(colours[:, truth] * light * (1 + 0.02 * rng.standard_normal((3, 40, 40))))
    blurred = np.clip((np.arange(40) - 20 + 8) / 16, 0, 1)[None].repeat(40, 0)  # 3 pixels off
    prior = np.stack([1 - blurred, blurred])
    assert (prior.argmax(axis=0) == truth).mean() < 0.95
    assert (_refine_borders(logs, prior) == truth).mean() > 0.99


def recipe(folder, name, shards):
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: {name}\ndata:\n  mixture: [{{dataset: {name}, shards: {str(shards)!r}, split: train}}]\n"
        f"  cache_dir: {str(folder / 'cache')!r}\n  workers: 0\n"
    )
    return f"--recipe={path}"


def test_the_report_shows_it_next_to_each_score(tmp_path):
    shards = tmp_path / "shards"
    for split, numbers in (("train", range(40)), ("val", range(40, 50)), ("test", range(50, 80))):
        with Writer(str(shards), SCENES, split) as writer:
            for number in numbers:
                writer.add(scene_tile(number))
    asked = [recipe(tmp_path, "scenes", shards), f"--out={tmp_path / 'out'}"]
    assert evaluate([*asked, "--baseline=oracle"]) == 0
    assert evaluate([*asked, "--baseline=statistics", "--mode=knn"]) == 0
    oracle = EvalResult.load(tmp_path / "out" / "oracle" / "results.json")
    knn = EvalResult.load(tmp_path / "out" / "knn" / "results.json")
    assert (oracle.mode, oracle.encoder, oracle.num_tiles, oracle.splits["test"]) == (
        "oracle",
        "oracle",
        30,
        ("test",),
    )
    assert oracle.value > 0.8
    assert oracle.interval[0] > knn.interval[1]
    page, text = write_report(find_results([tmp_path / "out"]), tmp_path / "report.html")
    assert f"<dt>oracle</dt><dd>{100 * oracle.value:.1f}</dd>" in page.read_text()
    (line,) = [x for x in text.read_text().splitlines() if "| statistics | knn |" in x]
    assert f"| {100 * oracle.value:.1f} | one run |" in line


def test_tables_show_it_in_the_cell_and_not_as_a_method(tmp_path):
    score = EvalResult(
        "pastis_hd", "miou", "probe", 0.6, {"a": 0.6}, (0.5, 0.7), 9, splits={"test": ("fold_5",)}
    )
    for name, result in {
        "probe": score,
        "oracle": dataclasses.replace(score, mode="oracle", encoder="oracle", value=0.9),
        "other": dataclasses.replace(score, mode="oracle", value=0.8, splits={"test": ("fold_1",)}),
    }.items():
        result.write(tmp_path / name / "results.json")
    page, text = write_report(find_results([tmp_path]), tmp_path / "report.html")
    assert "| 60.0 (50.0-70.0) (oracle 90.0) [-8.6] |" in text.read_text()
    assert '<span class="note">oracle 90.0</span>' in page.read_text()
    assert "**oracle" not in text.read_text()


def test_data_not_made_by_the_generator_are_refused(fields, tmp_path, capsys):
    shards = tmp_path / "shards"
    rng = np.random.default_rng(0)
    with Writer(str(shards), SCENES, "test") as writer:
        for number in range(4):
            tile = scene_tile(number)
            noise = rng.integers(200, 4000, tile.arrays["s2"].shape).astype(np.int16)
            writer.add(dataclasses.replace(tile, arrays={"s2": noise}))
    asked = [recipe(tmp_path, "scenes", shards), f"--out={tmp_path / 'out'}", "--baseline=oracle"]
    assert evaluate(asked) == 2
    assert "the tiles differ from synthetic scenes by" in capsys.readouterr().err
    assert evaluate([f"--recipe={fields.recipe(tmp_path)}", *asked[1:]]) == 2
    assert f"{FIELDS.name}: cover is not a map of a scene's classes" in capsys.readouterr().err
