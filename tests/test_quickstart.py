"""The quickstart: its recipe and table. tests/test_wheel.py runs it."""

from __future__ import annotations

import io
import json

from rich.console import Console
from testkit.runs import REPO

from maestro_scale.evaluation.results import EvalResult
from maestro_scale.model.cost import compute_cost, encoder_flops
from maestro_scale.quickstart import ENCODERS, equal_cost_steps, result_table
from maestro_scale.recipe import build_model_config, load_recipe, resolve_spec
from maestro_scale.shards.format.manifest import Manifest

RECIPE = REPO / "recipes" / "quickstart.yaml"
# Of a tile: 9 tokens of the image, 64 of Sentinel-2 (16 dates x 4), 32 of Sentinel-1 (2 x 4 dates x 4).
TOKENS = (9, 64, 32)
WIDTH, HIDDEN = 96, 192


def block_flops(tokens: int) -> int:
    """Projections of queries, keys, values and outputs, the MLP, scores and weighted sums."""
    return 2 * tokens * WIDTH * (4 * WIDTH + 2 * HIDDEN) + 4 * tokens**2 * WIDTH


def test_scratch_costs_as_much_as_the_pretraining(synthetic_shards):
    recipe = load_recipe(str(RECIPE), [f"data.mixture[0].shards={json.dumps(str(synthetic_shards))}"])
    entry = recipe.data.mixture[0]
    config = build_model_config(recipe, [resolve_spec(Manifest.load(entry.shards).spec, entry)])
    values = 60 * 60 * 4 + 16 * 6 * 6 * 10 + 2 * 4 * 6 * 6 * 2
    embedding = 2 * values * WIDTH
    encoder = embedding + 3 * sum(block_flops(n) for n in TOKENS)
    encoder += block_flops(sum(TOKENS))  # the last block is over all groups
    assert encoder_flops(config) == encoder == 76_137_984

    pretraining = compute_cost(config, recipe.masking.ratio).forward_flops
    assert recipe.train.steps == 1000
    assert equal_cost_steps(recipe) == round(1000 * pretraining / encoder) == 451  # 1000 * 34.36 / 76.14


def test_the_targets_are_those_of_the_paper(synthetic_shards):
    recipe = load_recipe(str(RECIPE))
    assert recipe.model.target == "patch_group"
    spec = resolve_spec(Manifest.load(str(synthetic_shards)).spec, recipe.data.mixture[0])
    values = {s.name: min(s.band_groups) * s.patch**2 for s in spec.sensors}
    # A group with one value would have a target of 0.
    assert values == {"aerial": 400, "s2": 18, "s1_asc": 9, "s1_des": 9}


def score(encoder: str, mode: str, value: float) -> EvalResult:
    interval, precision = (value - 0.05, value + 0.05), {"mean_average_precision": value + 0.01}
    return EvalResult("treesatai_ts", "wf1", mode, value, {}, interval, 12, scores=precision, encoder=encoder)


def test_the_table_has_a_row_per_encoder_and_mode_with_intervals():
    values = {
        "pretrained": [0.5, 0.6],
        "scratch": [0.55],
        "statistics": [0.3, 0.4],
        "untrained": [0.2, 0.35],
        "oracle": [0.9],
    }
    scores = {
        name: {mode: score(name, mode, v) for mode, v in zip(modes, values[name], strict=True)}
        for name, modes in ENCODERS.items()
    }
    printed = io.StringIO()
    Console(file=printed, width=80).print(result_table(scores))
    rows = [
        [c.strip() for c in line.split("│")[1:-1]] for line in printed.getvalue().splitlines() if "│" in line
    ]
    assert rows == [
        ["pretrained", "kNN on features", "50.0 (45.0-55.0)", "51.0"],
        ["pretrained", "linear probe", "60.0 (55.0-65.0)", "61.0"],
        ["scratch, equal cost", "trained network", "55.0 (50.0-60.0)", "56.0"],
        ["statistics", "kNN on features", "30.0 (25.0-35.0)", "31.0"],
        ["statistics", "linear probe", "40.0 (35.0-45.0)", "41.0"],
        ["untrained", "kNN on features", "20.0 (15.0-25.0)", "21.0"],
        ["untrained", "linear probe", "35.0 (30.0-40.0)", "36.0"],
        ["oracle", "class signatures", "90.0 (85.0-95.0)", "91.0"],
    ]
