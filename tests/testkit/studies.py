"""A tiny study for tests: two levels of the target, one seed, kNN."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from maestro_scale.evaluation.results import EvalResult
from maestro_scale.study.cells import Cell
from testkit.runs import RECIPE

STUDY: dict[str, Any] = {
    "name": "tiny",
    "claim": "Normalised targets are better.",
    "scales": {
        "cpu": {
            "datasets": {
                "trees": {
                    "data": {"dataset": "treesatai_ts", "tiles": {"train": 6, "val": 3, "test": 4}},
                    "base": "tiny.yaml",
                    "seeds": [0],
                    "evaluations": [{"name": "trees", "modes": ["knn"]}],
                }
            }
        }
    },
    "factors": {
        "target": {"patch": {"model.target": "patch"}, "none": {"model.target": "none"}},
    },
    "questions": [
        {
            "name": "patch-none",
            "claim": "Patch-wise targets are better than none.",
            "better": {"target": "patch"},
            "worse": {"target": "none"},
            "mode": "knn",
        }
    ],
}


def write_study(folder: Path, shards: Path | None = None, **changes: Any) -> Path:
    """The tiny study and its base recipe. ``changes``: top-level keys; ``setup``: keys of its one setup."""
    study = copy.deepcopy(STUDY)
    setup = study["scales"]["cpu"]["datasets"]["trees"]
    setup.update(changes.pop("setup", {}))
    if shards is not None:
        setup["data"] = {"dataset": "treesatai_ts", "shards": str(shards)}
    study.update(changes)
    recipe = RECIPE.format(shards="unused", cache=json.dumps(str(folder / "cache")))
    (folder / "tiny.yaml").write_text(recipe.replace("tracking: {enabled: false", "tracking: {enabled: true"))
    path = folder / "study.yaml"
    path.write_text(json.dumps(study))  # JSON is YAML
    return path


def write_results(cell: Cell, value: float = 0.5) -> None:
    """Results of all evaluations of a cell, without running it."""
    for evaluation in cell.evaluations:
        EvalResult("treesatai_ts", "wf1", evaluation.mode, value, {}, (value, value), 1).write(
            evaluation.results
        )
