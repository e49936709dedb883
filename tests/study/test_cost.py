"""The estimated cost of cells."""

from __future__ import annotations

import pytest
from testkit.runs import REPO

from maestro_scale.datasets.pastis_hd.reader import SPEC
from maestro_scale.recipe import resolve_spec
from maestro_scale.study import cost
from maestro_scale.study.cells import Cell, expand
from maestro_scale.study.config import Data, load_study


def random_cell(root, **changes) -> Cell:
    """The untrained encoder on PASTIS-HD, with 50 tiles."""
    study = load_study(REPO / "recipes" / "study" / "targets.yaml")
    data = Data(dataset="pastis_hd", tiles={"train": 20, "val": 6, "test": 24}, **changes)
    scale = study.scales["cpu"]
    setup = scale.setups["pastis_hd"].model_copy(update={"data": data, "seeds": (0,)})
    scale = scale.model_copy(update={"datasets": {"pastis_hd": setup}})
    cells = expand(study.model_copy(update={"scales": {"cpu": scale}}), "cpu", root)
    return next(c for c in cells if c.encoder == "random")


def test_every_crop_of_a_map_is_evaluated(tmp_path):
    whole, small = random_cell(tmp_path), random_cell(tmp_path, window_m=160)
    recipe = small.evaluations[0].recipe
    forward = cost._flops_without_mask(recipe, resolve_spec(SPEC, recipe.data.mixture[0]))
    assert cost.cell_cost(small, None).evaluate_flops == pytest.approx(50 * forward)
    assert cost.cell_cost(whole, None).evaluate_flops == pytest.approx(64 * 50 * forward)


def test_labels_of_whole_tiles_need_one_crop():
    assert cost._crops_per_tile(SPEC, None) == 8 * 8
    assert cost._crops_per_tile(SPEC, "crops_present") == 1
