"""How often the interval of a difference over seeds and tiles contains the true difference; it should in 95 %.

    python benchmarks/study_coverage.py

Two sets of runs are simulated on the same 300 tiles: the logit of a right decision on each of 6 classes is the sum of a
constant, an effect of the seed, one of the tile that both share, one of the tile in favour of either, and one of the
seed on the tile and class. The scenarios differ in which of these is large. The true difference of wF1 comes from many
seeds and tiles. Compared with the interval of the study: t over the seeds alone, tiles alone, and the sum of both
variances without subtracting the interaction that both contain. Writes benchmarks/results/study_coverage.json; exit
code 1 if the interval of the study covers, on average over scenarios, less than 92 or more than 98.5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.metrics import wf1
from maestro_scale.evaluation.paired import Component, Estimate, Run, difference, t_quantile
from maestro_scale.training.run_dir import git_revision


class Scenario(NamedTuple):
    """Standard deviations of the effects on the logit."""

    seed: float
    tile: float
    inter: float


SCENARIOS = {
    "seeds": Scenario(0.3, 0.1, 0.1),
    "tiles": Scenario(0.02, 1.5, 0.1),
    "both": Scenario(0.12, 1.0, 0.5),
    "interaction": Scenario(0.0, 0.0, 1.0),
}
NUM_SEEDS = (3, 5, 10)
NUM_TILES, NUM_CLASSES, EFFECT = 300, 6, 0.3


def draw(
    rng: np.random.Generator, scenario: Scenario, num_seeds: int, num_tiles: int
) -> list[list[np.ndarray]]:
    """Counts (T, 3, C) of each seed, of both sides."""
    truth = rng.random((num_tiles, NUM_CLASSES)) < 0.3
    shared = 1 + rng.normal(size=(num_tiles, 1))
    favours = scenario.tile * rng.normal(size=(num_tiles, 1)) / 2
    sides = []
    for sign in (1, -1):
        counts = []
        for _ in range(num_seeds):
            logits = shared + sign * (EFFECT / 2 + favours) + scenario.seed * rng.normal()
            logits = logits + scenario.inter * rng.normal(size=truth.shape)
            predicted = truth ^ (rng.random(truth.shape) > 1 / (1 + np.exp(-logits)))
            counts.append(np.stack([predicted & truth, predicted & ~truth, ~predicted & truth], axis=1))
        sides.append(counts)
    return sides


def true_difference(scenario: Scenario) -> tuple[float, float]:
    """(difference of the mean scores, its standard error) from 100 draws of 10 seeds on 3,000 tiles."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(100):
        means = [np.mean([wf1(c.sum(0)) for c in side]) for side in draw(rng, scenario, 10, 3000)]
        found.append(means[0] - means[1])
    return float(np.mean(found)), float(np.std(found) / math.sqrt(len(found)))


def _summed(found: Estimate) -> Component:
    variance = found.seed.variance + found.tile.variance
    parts = sum(c.variance**2 / c.freedom for c in (found.seed, found.tile))
    return Component(variance, variance**2 / parts if parts else math.inf)


INTERVALS: dict[str, Callable[[Estimate], Component]] = {
    "study": lambda found: found.total,
    "seeds alone": lambda found: found.seed,
    "tiles alone": lambda found: found.tile,
    "not subtracted": _summed,
}


def measure(scenario: Scenario, num_seeds: int, draws: int, true: float) -> dict[str, dict[str, float]]:
    """{interval: share of the draws whose interval contains the true difference, and its mean half width}."""
    rng = np.random.default_rng(num_seeds)
    keys = tuple(map(str, range(NUM_TILES)))
    covered = {name: [0.0, 0.0] for name in INTERVALS}
    for _ in range(draws):
        a, b = (
            [Run("wf1", seed, None, TileCounts(keys, counts)) for seed, counts in enumerate(side)]
            for side in draw(rng, scenario, num_seeds, NUM_TILES)
        )
        found = difference(a, b)
        for name, choose in INTERVALS.items():
            component = choose(found)
            half = math.sqrt(component.variance) * t_quantile(0.975, component.freedom)
            covered[name][0] += (abs(found.value - true) <= half) / draws
            covered[name][1] += half / draws
    return {name: {"covered": share, "half_width": half} for name, (share, half) in covered.items()}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "study_coverage.json")
    args = parser.parse_args()
    table = Table(title="true difference within the 95 % interval, % of draws (half width in points)")
    for column in ("large", "seeds", *INTERVALS):
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for name, scenario in SCENARIOS.items():
        true, error = true_difference(scenario)
        for num_seeds in NUM_SEEDS:
            found = measure(scenario, num_seeds, args.draws, true)
            rows.append(
                {"scenario": name, "seeds": num_seeds, "true": true, "true_error": error, "intervals": found}
            )
            texts = [f"{100 * f['covered']:.1f} ({100 * f['half_width']:.1f})" for f in found.values()]
            table.add_row(name, str(num_seeds), *texts)
    Console(width=110).print(table)
    mean = float(np.mean([row["intervals"]["study"]["covered"] for row in rows]))
    record = {
        "command": "python benchmarks/study_coverage.py",
        "git": git_revision(),
        "platform": platform.platform(),
        "draws": args.draws,
        "tiles": NUM_TILES,
        "mean_covered": mean,
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(not 0.92 <= mean <= 0.985)


if __name__ == "__main__":
    raise SystemExit(main())
