"""The recipes for clusters: each loads, plans on its number of GPUs, and its micro-batch fits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from testkit.runs import REPO

from maestro_scale.planning import GPUS, Cluster, plan_cluster
from maestro_scale.recipe import build_model_config, load_recipe
from maestro_scale.training.dry_run import specs_and_sizes
from maestro_scale.training.memory import USABLE_MEMORY, MemoryEstimator
from maestro_scale.training.micro_batch import largest_micro_batch

RECIPES = sorted((REPO / "recipes" / "scale").glob("*.yaml"))


def num_gpus(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def test_there_are_recipes_for_8_64_and_512_gpus():
    assert {num_gpus(path) for path in RECIPES} == {8, 64, 512}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_fills_its_cluster(path, monkeypatch):
    monkeypatch.setenv("MAESTRO_DATA", "/nowhere")
    recipe, world_size = load_recipe(path), num_gpus(path)
    batch = recipe.train.global_batch
    assert recipe.train.micro_batch == "auto"
    assert recipe.model.compile == "step"
    assert recipe.data.lanes % world_size == 0
    assert recipe.lr == pytest.approx(3e-5 * math.sqrt(batch / 3))
    specs, stored = specs_and_sizes(recipe)
    estimator = MemoryEstimator(build_model_config(recipe, specs), specs)
    micro_batch, memory = largest_micro_batch(
        recipe,
        world_size,
        GPUS["h100"].memory_bytes,
        lambda changed: estimator.step(changed, world_size, "cuda"),
    )
    assert batch % (world_size * micro_batch) == 0
    assert memory.device <= USABLE_MEMORY * 80e9
    plan = plan_cluster(recipe, specs, stored, Cluster("h100", world_size, 8))
    (chosen,) = (x for x in plan.layouts if (x.stage, x.micro_batch) == (recipe.zero_stage, micro_batch))
    assert chosen.fits
    assert chosen.memory.device == memory.device
    assert (
        chosen.time.total_s <= 1.1 * plan.best.time.total_s
    )  # the stage is about the fastest that plan finds
    assert not chosen.time.is_launch_bound
    assert plan.mfu > 0.2


def test_pip_installs_the_recipes_of_every_folder():
    project = (REPO / "pyproject.toml").read_text()
    for folder in {path.parent.relative_to(REPO) for path in (REPO / "recipes").rglob("*.yaml")}:
        assert f'"share/maestro_scale/{folder}" = ["{folder}/*.yaml"]' in project
