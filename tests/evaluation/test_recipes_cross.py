"""Recipes for other datasets than the one pretrained on: which sensors the encoder's weights serve."""

from pathlib import Path

import pytest

from maestro_scale import datasets
from maestro_scale.evaluation.adopt import adopt
from maestro_scale.model.config import DatasetView
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import load_recipe, resolve_sensors
from maestro_scale.training.pretrain import build_model_config

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.size=tiny", "model.width=32", "model.depth=2", "model.heads=2", "model.inter_depth=1"]


@pytest.mark.parametrize(
    ("pretraining", "benchmark", "used", "left"),
    [
        ("s2_naip", "treesatai_ts", {"aerial", "s2", "s1_asc", "s1_des"}, set()),
    ],
)
def test_an_encoder_from_elsewhere_serves_these_sensors(pretraining, benchmark, used, left):
    trained = load_recipe(RECIPES / f"{pretraining}.yaml", SMALL)
    specs = [datasets.spec(entry.dataset) for entry in trained.data.mixture]
    model = Maestro(build_model_config(trained, specs)).initialise(0)
    (entry,) = load_recipe(RECIPES / "cross" / f"{pretraining}_to_{benchmark}.yaml").data.mixture
    spec = datasets.spec(entry.dataset)
    view = DatasetView(spec.name, resolve_sensors(spec, entry), spec.pos_grid, spec.ref_sensor)
    adopted, notes = adopt(model, view)
    assert {s.name for s in adopted.config.sensors} == used
    assert {note.split()[0] for note in notes if " is left out: " in note} == left
    own = {
        s.embed: s.scale.divisor for v in model.config.views for s in v.sensors if s.scale.kind == "linear"
    }
    for sensor in adopted.config.sensors:
        if sensor.scale.kind == "linear":
            assert sensor.scale.divisor == own[sensor.embed], sensor.name
