"""The oracle: what each kind of sensor tells about the classes of synthetic scenes, and refusal of other data."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.special import logsumexp

from maestro_scale.datasets.pastis_hd.reader import S2_BANDS
from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Sensor, Target, Tile
from maestro_scale.datasets.synthetic.classes import variants_of
from maestro_scale.datasets.synthetic.landscape import Landscape
from maestro_scale.datasets.synthetic.scene import Scene
from maestro_scale.evaluate import main as evaluate
from maestro_scale.evaluation.oracle.borders import class_map, refine_borders
from maestro_scale.evaluation.oracle.evidence import optical_evidence, photo_evidence, radar_evidence
from maestro_scale.evaluation.oracle.mixture import class_shares, responsibilities
from maestro_scale.evaluation.oracle.sensors import SensorKinds
from maestro_scale.evaluation.oracle.simulation import SceneKind, decibels
from maestro_scale.evaluation.report.groups import find_results
from maestro_scale.evaluation.report.report import write_report
from maestro_scale.evaluation.report.summary import summarise
from maestro_scale.evaluation.results import EvalResult, EvaluationError, SensorScore
from maestro_scale.shards.write.writer import Writer
from tests.evaluation.conftest import FIELDS, SCENES, scene_tile

KIND = SceneKind(15, 60.0, fields=False)
VARIANTS = variants_of(15)
LABELS = np.array([v.label for v in VARIANTS])
DAYS = np.arange(12, 366, 23)
ORBITS = {"asc": np.array([40, 130, 220, 310]), "des": np.array([60, 150, 240, 330])}
RGB, PHOTO_M, PHOTO_CELL, PHOTO_DAY = ("R", "G", "B"), 1.0, 10, 165
CLEAR = np.zeros((len(DAYS), 6, 6), np.float32)


def evidence(scene: Scene) -> dict[str, np.ndarray]:
    """(V, 6, 6) log likelihoods by kind of sensor."""
    optical = scene.optical(DAYS, S2_BANDS, 10.0, CLEAR, CLEAR)
    radar = [(orbit, decibels(scene.radar(days, orbit, 10.0)), days) for orbit, days in ORBITS.items()]
    photo = scene.photo(PHOTO_DAY, RGB, PHOTO_M)
    found = {
        "optical": optical_evidence(optical, DAYS, S2_BANDS, 10.0, KIND, VARIANTS),
        "radar": radar_evidence(radar, 10.0, KIND, VARIANTS),
        "image": photo_evidence(photo, PHOTO_DAY, RGB, PHOTO_M, PHOTO_CELL, KIND, VARIANTS),
    }
    return {name: e.logs for name, e in found.items()}


def scene_of(label: int, index: int) -> Scene:
    """A scene of one class."""
    scene = Scene(5, index, 60.0, 15)
    landscape = Landscape(60.0, 15, 0, scene.rng("regions"))
    landscape.classes[:] = label
    scene.__dict__["landscape"] = landscape  # where cached_property keeps it
    return scene


# Pairs of classes by the table in datasets/synthetic/classes.py, and the kinds of sensors that tell them apart.
PAIRS = {
    "radar only": ((7, 8), {"radar"}),
    "texture only": ((5, 6), {"image"}),
    "season and radar": ((9, 10), {"optical", "radar"}),
    "season and texture": ((11, 12), {"optical", "image"}),
}


@pytest.mark.parametrize("which", PAIRS)
def test_pairs_of_classes_are_known_from_the_sensors_they_are_made_for_and_from_no_others(which):
    """Which of the two classes is the tile? 1 of 2 is chance; of 24 answers 17 or more are right by chance in 3 %."""
    pair, telling = PAIRS[which]
    truth = np.arange(24) % 2
    tiles = [evidence(scene_of(pair[second], index)) for index, second in enumerate(truth)]
    for size in (1, 2, 3):
        for kinds in itertools.combinations(tiles[0], size):
            # Added per variant before the variants of a class are joined: only so an exclusive or can be seen.
            of_variants = [sum(tile[kind].sum(axis=(1, 2)) for kind in kinds) for tile in tiles]
            answers = [logsumexp(v[pair[1] == LABELS]) > logsumexp(v[pair[0] == LABELS]) for v in of_variants]
            right = (answers == truth).mean()
            if telling <= set(kinds):
                assert right >= 0.8, (kinds, right)
            else:
                assert right <= 0.7, (kinds, right)


def test_shares_of_pixels_are_found_through_clouds_light_and_season():
    errors, shifted = [], []
    for index in range(8):
        scene = Scene(5, index, 60.0, 5)  # five classes that differ in season alone
        kind, variants = SceneKind(5, 60.0, fields=False), variants_of(5)
        snow, cloud = scene.weather(DAYS, 10.0)
        values = scene.optical(DAYS, S2_BANDS, 10.0, snow, cloud)
        truth = scene.fractions(10.0)
        for days, found in ((DAYS, errors), ((DAYS + 50) % 365, shifted)):
            logs = optical_evidence(values, days, S2_BANDS, 10.0, kind, variants).logs
            shares = class_shares(responsibilities(logs), np.arange(5), 5)
            np.testing.assert_allclose(shares.sum(axis=0), 1)
            found.append(np.abs(shares - truth).sum(axis=0).mean() / 2)
    assert np.mean(errors) < 0.15  # of a pixel's area
    assert np.mean(shifted) > 0.5, "the dates told it nothing"


def test_a_tile_of_two_variants_with_noisy_cells():
    """Left half one variant, right half another, a third fits some cells best by chance: it is not believed."""
    logs = np.zeros((3, 6, 6))
    logs[0, :, :3] = logs[1, :, 3:] = 6
    logs[2, 2, 1] = 9
    found = responsibilities(logs).argmax(axis=0)
    assert (found == [0, 0, 0, 1, 1, 1]).all()
    # Six variants, whose noise is larger than what the true one is ahead by: few variants are more probable than many.
    noisy = np.random.default_rng(0).normal(0, 4, (6, 6, 6))
    noisy[0] += 3
    assert responsibilities(noisy)[0].mean() > 0.9
    shares = class_shares(responsibilities(np.zeros((2, 6, 6))), np.array([1, 1]), 3)
    np.testing.assert_allclose(shares, np.array([0, 1, 0])[:, None, None] * np.ones((1, 6, 6)))


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
    assert (refine_borders(logs, prior) == truth).mean() > 0.99
    coarse = prior[:, ::4, ::4]
    assert (class_map(coarse, 40, np.exp(logs) * 100, 40.0) == truth).mean() > 0.98
    assert (class_map(coarse, 40, None, 40.0) == truth).mean() < 0.95


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
    assert oracle.by_sensors == {"optical": SensorScore(oracle.value, oracle.interval, oracle.per_class)}
    page, text = write_report(find_results([tmp_path / "out"]), tmp_path / "report.html")
    assert f"<dt>oracle</dt><dd>{100 * oracle.value:.1f}</dd>" in page.read_text()
    (line,) = [x for x in text.read_text().splitlines() if "| statistics | knn |" in x]
    assert f"| {100 * oracle.value:.1f} | one run |" in line


MULTI = DatasetSpec(
    name="multi",
    title="Synthetic scenes through three kinds of sensors",
    tile_m=60.0,
    crop_m=60.0,
    pos_grid=12,
    modalities=(
        Modality("photo", RGB, PHOTO_M, 60, "uint8"),
        Modality("s2", S2_BANDS, 10.0, 6, "int16", series=True),
        Modality("s1_asc", ("VV", "VH"), 10.0, 6, "float32", series=True),
    ),
    targets=(Target("species", "multilabel", tuple("abcdefghijklmno"), threshold=0.07),),
    sensors=(
        Sensor("photo", "photo", 60, 10, 1, (0, 1, 2), (3,), Scale("linear", 255), "photo", "photo"),
        Sensor("s2", "s2", 6, 2, 16, tuple(range(10)), (4, 4, 2), Scale("linear", 5000), "s2", "s2"),
        Sensor("s1_asc", "s1_asc", 6, 2, 4, (0, 1), (1, 1), Scale("log", 5), "s1", "s1"),
    ),
)


def multi_tile(number: int) -> Tile:
    """A scene of 15 classes on days without clouds."""
    scene = Scene(9, number, 60.0, 15)
    days = {"photo": np.array([PHOTO_DAY]), "s2": DAYS, "s1_asc": ORBITS["asc"]}
    radar = scene.radar(ORBITS["asc"], "asc", 10.0)
    radar[1] = np.nan if number == 0 else radar[1]  # a date without a measurement
    dates = {m: np.stack([np.full(len(d), 2020), d, 0 * d], axis=1).astype(np.int16) for m, d in days.items()}
    return Tile(
        key=f"multi-{number}",
        arrays={
            "photo": np.rint(scene.photo(PHOTO_DAY, RGB, PHOTO_M)[None] * 255).astype(np.uint8),
            "s2": np.rint(scene.optical(DAYS, S2_BANDS, 10.0, CLEAR, CLEAR) * 10_000).astype(np.int16),
            "s1_asc": radar,
        },
        dates=dates,
        masks={},
        targets={"species": scene.shares().astype(np.float32)},
        ref_date=dates["photo"][0],
    )


def test_every_set_of_sensors_has_a_score_and_more_sensors_tell_more(tmp_path):
    with Writer(str(tmp_path / "shards"), MULTI, "test") as writer:
        for number in range(40):
            writer.add(multi_tile(number))
    out = tmp_path / "out"
    assert (
        evaluate([recipe(tmp_path, "multi", tmp_path / "shards"), f"--out={out}", "--baseline=oracle"]) == 0
    )
    result = EvalResult.load(out / "oracle" / "results.json")
    sets = result.by_sensors
    singles = ["optical", "radar", "image"]
    assert list(sets) == [*singles, "optical+radar", "optical+image", "radar+image", "optical+radar+image"]
    joint = sets["optical+radar+image"]
    assert (joint.value, joint.interval, joint.per_class) == (result.value, result.interval, result.per_class)
    for name, score in sets.items():
        for single in name.split("+"):
            assert score.interval[1] >= sets[single].value, f"{name} is worse than {single} alone"
    assert joint.interval[0] > max(sets[name].value for name in singles)
    page, text = write_report(find_results([tmp_path / "out"]), tmp_path / "report.html")
    (line,) = [x for x in text.read_text().splitlines() if x.startswith("| **all classes** |")]
    value, (low, high) = sets["radar"].value, sets["radar"].interval
    assert line.split(" | ")[2] == f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    (line,) = [x for x in text.read_text().splitlines() if x.startswith("| a |")]
    assert line.split(" | ")[1] == f"{100 * sets['optical'].per_class['a']:.1f}"
    assert "multi: score of the oracle by kinds of sensors" in page.read_text()


def test_of_several_folds_the_scores_by_sensors_are_averaged():
    def fold(number: int, value: float, oak: float | None) -> tuple[str, EvalResult]:
        score = SensorScore(value, (value - 0.1, value + 0.1), {"oak": oak})
        result = EvalResult("pastis_hd", "miou", "oracle", 0.9, {"oak": 0.9}, (0.8, 1.0), 9, folds=(number,))
        return f"fold_{number}", dataclasses.replace(result, by_sensors={"radar": score})

    mean = summarise([fold(1, 0.4, 0.2), fold(2, 0.6, 0.4), fold(3, 0.8, None)]).by_sensors["radar"]
    assert (mean.value, *mean.interval) == pytest.approx((0.6, 0.5, 0.7))
    assert mean.per_class["oak"] == pytest.approx(0.3)


def test_a_dataset_without_sensors_of_scenes_is_refused():
    dem = Modality("dem", ("DSM",), 1.0, 60, "float32")
    sensor = Sensor("dem", "dem", 60, 10, 1, (0,), (1,), Scale("linear", 1), "dem", "dem")
    spec = dataclasses.replace(MULTI, modalities=(dem,), sensors=(sensor,))
    with pytest.raises(
        EvaluationError, match="multi: the oracle needs an optical or radar series or an image"
    ):
        SensorKinds.of(spec)
    only = SensorKinds.of(dataclasses.replace(MULTI, sensors=MULTI.sensors[2:]))
    assert only.kinds == ("radar",)


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
    assert "| 60.0 (50.0-70.0) (oracle 90.0) |" in text.read_text()
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
