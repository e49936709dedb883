"""Sensors and crops that do not fit a dataset: one line and exit code 2, in a dry run, in training and in a plan."""

from __future__ import annotations

import json

import pytest
from testkit.runs import REPO, Trainer, write_recipe

from maestro_scale import datasets, train
from maestro_scale.recipe import RecipeError, load_recipe
from maestro_scale.training.dry_run import specs_and_sizes
from maestro_scale.training.pretrain import open_datasets

# Tiles of 60 m; Sentinel-2 and Sentinel-1 have pixels of 10 m, the aerial image of 0.2 m.
REFUSED = [
    ("crop_m=61", "data.mixture[0].crop_m: 61 m is larger than a tile, 60 m"),
    ("crop_m=25", "crop_m: 25 m is not a multiple of the coarsest sensor's pixel, 10 m: use 20 or 30"),
    ("crop_m=59.8", "crop_m: 59.8 m is not a multiple of the coarsest sensor's pixel, 10 m: use 50 or 60"),
    ("crop_m=5", "crop_m: 5 m is not a multiple of the coarsest sensor's pixel, 10 m: use 10"),
    ("crop_m=0", "crop_m: should be greater than 0, got 0"),
    ("crop_m=-10", "crop_m: should be greater than 0, got -10"),
    ("crop_m=.nan", "crop_m: should be"),
    ("crop_m=.inf", "crop_m: should be"),
    ("sensors.aerial.image_size=50", "sensors.aerial.patch: 20 does not divide image_size 50"),
    ("sensors.s2.patch=4", "sensors.s2.patch: 4 does not divide image_size 6"),
    ("sensors.s2.bands=[0,10]", "sensors.s2.bands: [0, 10] do not index the 10 bands of s2 (0 to 9)"),
    ("sensors.aerial.num_dates=2", "sensors.aerial.num_dates: aerial is a single image, so 1, not 2"),
    ("sensors.s1_acs.patch=2", "sensors.s1_acs: unknown sensor (did you mean 's1_asc'?)"),
]


def override(change: str) -> str:
    return f"data.mixture[0].{change}"


@pytest.fixture
def recipe(synthetic_shards, tmp_path):
    return write_recipe(tmp_path, synthetic_shards)


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_a_dry_run_refuses_in_one_line(recipe, capsys, change, reason):
    assert train.main([f"--recipe={recipe}", "--dry-run", "--set", override(change)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    first, *rest = errors.splitlines()
    assert first.startswith("error: ")
    assert reason in first
    # Another line names another field that the same change makes wrong (groups of bands, a shared embedding).
    assert all("data.mixture[0].sensors." in line for line in rest)


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_training_and_planning_refuse_what_a_dry_run_refuses(recipe, change, reason):
    for use in (open_datasets, specs_and_sizes):
        with pytest.raises(RecipeError) as caught:
            use(load_recipe(recipe, [override(change)]))
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    "change", ["crop_m=60", "crop_m=30", "sensors.s1_des=null", "sensors.s2.image_size=12"]
)
def test_what_fits_is_accepted(recipe, change):
    loaded = load_recipe(recipe, [override(change)])
    (dataset,) = open_datasets(loaded)
    (spec,), _ = specs_and_sizes(loaded)
    assert dataset.source.spec == spec
    assert spec.crop_m == (30 if change == "crop_m=30" else 60)
    assert dataset.manifest.spec.crop_m == 60


@pytest.mark.parametrize("recipe", ["flair_hub.yaml", "flair2.yaml", "pastis_hd.yaml"])
def test_the_reference_sensor_of_segmentation_cannot_be_left_out(capsys, recipe):
    ref = datasets.spec(recipe.removesuffix(".yaml")).ref_sensor
    arguments = [f"--recipe={REPO / 'recipes' / recipe}", "--dry-run", "--set"]
    assert train.main([*arguments, override(f"sensors.{ref}=null")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: data.mixture[0].sensors.{ref}: cannot be left out, segmentation is predicted on its grid"
    )


def test_the_shards_must_hold_the_dataset(recipe):
    with pytest.raises(
        RecipeError, match=r"^data\.mixture\[0\]\.dataset: 'pastis_hd', but .* holds 'treesatai_ts': set data"
    ):
        open_datasets(load_recipe(recipe, [override("dataset=pastis_hd"), override("sensors={}")]))


@pytest.mark.parametrize(("ranks", "arguments"), [(1, ["--dry-run"]), (1, []), (2, [])])
def test_the_commands_print_one_line_and_exit_with_2(recipe, tmp_path, ranks, arguments):
    run_dir = None if arguments else tmp_path / "run"
    code, output = Trainer(recipe).run(run_dir, ranks, *arguments, "--set", override("crop_m=61"))
    assert code == 2, output[-3000:]
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert errors == ["error: data.mixture[0].crop_m: 61 m is larger than a tile, 60 m"], output
    assert "Traceback" not in output


def test_a_dry_run_without_a_readable_manifest_says_so_in_one_line(recipe, tmp_path, capsys):
    # A dataset that is not shipped is described by its manifest alone.
    arguments = [f"--recipe={recipe}", "--dry-run", "--set", override("dataset=mine"), override("sensors={}")]
    assert train.main([*arguments, override(f"shards={json.dumps(str(tmp_path / 'none'))}")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "manifest.json" in line
