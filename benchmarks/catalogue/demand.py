"""What a node of eight H100 needs of its data loaders, as `plan` predicts it, beside what the cores can "
"prepare."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.page import table
from maestro_scale.planning import Cluster, plan_cluster
from maestro_scale.recipe import load_recipe
from maestro_scale.training.dry_run import specs_and_sizes

ROOT = Path(__file__).parents[2]
GPUS = 8
CORES = 112  # of a DGX H100: two processors of 56
RECIPES = {
    "recipes/vitb.yaml": ("train.epochs=null", "train.steps=50000"),
    "recipes/vitl.yaml": ("train.epochs=null", "train.steps=50000"),
    "recipes/flair_hub.yaml": ("train.epochs=null", "train.steps=50000"),
    "recipes/scale/vitb_8.yaml": (),
    "recipes/scale/vitl_8.yaml": (),
}
"""{recipe: settings}. The paper's have a length in epochs, which plan cannot convert without the shards."""


def node_demand(results: Mapping[str, Any]) -> str:
    """Markdown: needed samples/s and bytes/s of a node, and the cores that prepare as many by the "
    "loader's result."""
    cpu_us = results["loader"]["cpu_us_per_sample"]
    rows = []
    for path, settings in RECIPES.items():
        recipe = load_recipe(ROOT / path, list(settings))
        specs, stored = specs_and_sizes(recipe)
        cluster = Cluster("h100", GPUS, GPUS)
        plan = plan_cluster(recipe, specs, stored, cluster)
        dataset = recipe.data.mixture[0].dataset
        if dataset not in cpu_us:
            continue
        per_core = 1e6 / statistics.median(cpu_us[dataset]["ours, raw"])
        rows.append(
            (
                f"`{path}`",
                f"`{dataset}`",
                f"{plan.samples_per_s:,.0f}",
                f"{plan.node_bytes_per_s(cluster) / 1e9:.1f} GB/s",
                f"{per_core:,.0f}",
                f"{plan.samples_per_s / per_core:.1f}",
                f"{CORES * per_core:,.0f}",
            )
        )
    columns = (
        "recipe",
        "samples",
        "needed, samples/s",
        "needed, as stored",
        "one core prepares",
        "cores needed",
        f"{CORES} cores prepare",
    )
    return (
        f"### What a node of {GPUS} H100 needs\n\nThe speed, and the bytes of a sample as stored, are what "
        f"`maestro-scale plan` predicts ([gpu.md](gpu.md)); the samples that a core prepares are those of "
        f"the table above, whose size differs a little. Rates of "
        f"a core are those of the machine of this page, with the codec raw; a DGX H100 has {CORES} cores. "
        f"Cores beyond those of one "
        "machine share memory bandwidth, which is not measured here.\n\n" + table(columns, rows)
    )
