"""The table of docs/gpu.md is what plan computes."""

from __future__ import annotations

import re

import pytest
from testkit.runs import REPO

from maestro_scale.planning import Cluster, plan_cluster
from maestro_scale.recipe import load_recipe
from maestro_scale.training.dry_run import specs_and_sizes

PAGE = (REPO / "docs" / "gpu.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| `recipes/")
]
PAPER = ["train.epochs=null", "train.steps=50000"]


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix(" %"))


def test_every_scale_recipe_has_a_row():
    named = {re.search(r"`(.*)`", row[0])[1] for row in ROWS}
    assert named >= {f"recipes/scale/{p.name}" for p in (REPO / "recipes" / "scale").glob("*.yaml")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_what_plan_prints(row, monkeypatch):
    monkeypatch.setenv("MAESTRO_DATA", "/nowhere")
    name, gpus, batch, layout, gib, eager, compiled, speed, mfu, hours, data = row
    path = re.search(r"`(.*)`", name)[1]
    recipe = load_recipe(REPO / path, PAPER if "(paper)" in name else [])
    specs, stored = specs_and_sizes(recipe)
    cluster = Cluster("h100", int(gpus), 8)
    plan = plan_cluster(recipe, specs, stored, cluster)
    assert recipe.train.global_batch == number(batch)
    assert f"{plan.best.stage} × {plan.best.micro_batch}" == layout
    for shown, value in (
        (gib, plan.best.memory.device / 2**30),
        (eager, 1e3 * plan.eager.total_s),
        (compiled, 1e3 * plan.compiled.total_s),
        (speed, plan.samples_per_s),
        (mfu, 100 * plan.mfu),
        (hours, plan.seconds / 3600),
        (data, plan.node_bytes_per_s(cluster) / 1e9),
    ):
        # As rounded in the table, or within 2 %.
        digits = len(shown.removesuffix(" %").partition(".")[2])
        assert number(shown) == pytest.approx(value, rel=0.02, abs=0.51 * 10**-digits)
