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
    whole, small = (random_cell(tmp_path, **changes).evaluations[0] for changes in ({}, {"window_m": 160}))
    forward = cost._flops_without_mask(small.recipe, resolve_spec(SPEC, small.recipe.data.mixture[0]))
    assert cost._feature_flops(small) == pytest.approx(50 * forward)
    assert cost._feature_flops(whole) == pytest.approx(64 * 50 * forward)
    # 20 crops of 4 x 4 cells: 300 steps for 4 learning rates, from 4 x 96 features to 4 x 4 pixels of 19 classes,
    # forward and backward.
    assert cost._probe_flops(small) == 6 * 4 * 300 * (20 * 16) * (4 * 96) * (16 * 19)
    # All crops: 20,480 cells, of which a step takes 1,024.
    assert cost._probe_flops(whole) == 6 * 4 * 300 * 1024 * (4 * 96) * (16 * 19)


def test_modes_on_frozen_features_share_them(tmp_path):
    study = load_study(REPO / "recipes" / "study" / "targets.yaml")
    cell = next(c for c in expand(study, "cpu", tmp_path) if c.encoder == "random")
    knn, probe = cell.evaluations
    assert (knn.mode, probe.mode, cost._probe_flops(probe)) == ("knn", "probe", 0)  # labels of whole tiles
    assert cost.cell_cost(cell, None).evaluate_flops == cost._feature_flops(knn) > 0
