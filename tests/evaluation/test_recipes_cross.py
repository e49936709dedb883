"""Recipes for datasets other than the pretraining one: the sensors that the encoder has weights for."""

from pathlib import Path

import pytest

from maestro_scale import datasets
from maestro_scale.datasets.flair_hub.reader import FULL_SPEC
from maestro_scale.evaluation.features.adapt import adapt_encoder
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import build_model_config, load_recipe, resolve_spec

RECIPES = Path(__file__).parents[2] / "recipes"
SPOT_TOO = ("aerial", "dem", "s2", "s1_asc", "s1_des", "spot")
SMALL = ["model.size=tiny", "model.width=32", "model.depth=2", "model.heads=2", "model.inter_depth=1"]


def stored_spec(pretraining, dataset):
    """What the shards of a pretraining recipe hold."""
    return FULL_SPEC.select(SPOT_TOO) if pretraining == "flair_hub_transfer" else datasets.spec(dataset)


def test_one_model_learns_from_all_five():
    joint = load_recipe(RECIPES / "joint.yaml", SMALL)
    specs = [resolve_spec(datasets.spec(entry.dataset), entry) for entry in joint.data.mixture]
    assert {spec.name for spec in specs} == {"treesatai_ts", "pastis_hd", "flair_hub", "flair2", "s2_naip"}
    config = build_model_config(joint, specs)
    assert {s.embed for s in config.all_sensors} == {"aerial", "spot", "dem", "s2", "s1"}
    scales = {(s.embed, s.scale.divisor) for s in config.all_sensors if s.scale.kind == "linear"}
    assert scales == {("aerial", 255), ("spot", 255), ("dem", 1000), ("s2", 5000), ("s1", 20)}


@pytest.mark.parametrize(
    ("pretraining", "benchmark", "used", "left"),
    [
        ("s2_naip", "treesatai_ts", {"aerial", "s2", "s1_asc", "s1_des"}, set()),
        ("s2_naip", "pastis_hd", {"spot", "s2", "s1_asc", "s1_des"}, set()),
        ("s2_naip", "flair2", {"aerial", "s2"}, {"dem"}),
        ("s2_naip", "flair_hub", {"aerial", "s2", "s1_asc", "s1_des"}, {"dem"}),
        ("flair_hub", "treesatai_ts", {"aerial", "s2", "s1_asc", "s1_des"}, set()),
        ("flair_hub_transfer", "pastis_hd", {"spot", "s2", "s1_asc", "s1_des"}, set()),
    ],
)
def test_an_encoder_of_another_dataset_serves_these_sensors(pretraining, benchmark, used, left):
    trained = load_recipe(RECIPES / f"{pretraining}.yaml", SMALL)
    specs = [resolve_spec(stored_spec(pretraining, e.dataset), e) for e in trained.data.mixture]
    model = Maestro(build_model_config(trained, specs)).initialise(0)
    cross = f"{pretraining.removesuffix('_transfer')}_to_{benchmark}.yaml"
    (entry,) = load_recipe(RECIPES / "cross" / cross).data.mixture
    spec = datasets.spec(entry.dataset)
    adapted, notes = adapt_encoder(model, resolve_spec(spec, entry))
    assert {s.name for s in adapted.config.sensors} == used
    assert {note.split()[0] for note in notes if " is left out: " in note} == left
    own = {
        s.embed: s.scale.divisor for v in model.config.views for s in v.sensors if s.scale.kind == "linear"
    }
    for sensor in adapted.config.sensors:
        # SPOT is bytes here and reflectance there; radar is decibels or linear, a fifth of the logarithm.
        if sensor.name in ("aerial", "s2", "dem"):
            assert sensor.scale.divisor == own[sensor.embed], sensor.name
