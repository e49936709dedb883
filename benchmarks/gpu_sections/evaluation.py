"""Section: the same encoder evaluated on the CPU and on the device: features, kNN and linear probe."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import config_of, small_recipe, specs_of
from benchmarks.gpu_sections.data import write_synthetic
from benchmarks.gpu_sections.device import exact_fp32
from maestro_scale.evaluation.benchmark import Benchmark
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe.sections import Precision

MODES = ("knn", "probe")
# (limit of the features, of a score). bf16 has 8 bits of mantissa; a score changes where a tile is near a threshold.
_LIMITS: dict[Precision, tuple[float, float]] = {"fp32": (1e-3, 2e-3), "bf16": (2e-2, 1e-2)}


def run(bench: Bench) -> None:
    """Evaluate on the CPU in fp32, and on the device in fp32 and bf16; compare."""
    exact_fp32()
    sizes = {split: bench.pick(full, 6) for split, full in (("train", 192), ("val", 48), ("test", 48))}
    shards = write_synthetic(bench.work, "treesatai_ts", sizes)
    recipe = small_recipe(shards, bench.work, bench.rehearse)
    model = Maestro(config_of(recipe)).initialise(0)

    def evaluate(name: str, device: torch.device, precision: Precision) -> tuple[dict[str, float], Path]:
        folder = bench.work / "features" / name
        benchmark = Benchmark(specs_of(recipe)[0], str(shards), bench.work / "cache", folder)
        world = dataclasses.replace(bench.world, device=device)
        started = time.perf_counter()
        results = evaluate_frozen(model, benchmark, MODES, world=world, precision=precision)
        scores = {r.mode: r.value for r in results}
        timings = {f"{r.mode} {what}": value for r in results for what, value in r.timings.items()}
        row = {"scores": scores, "seconds": time.perf_counter() - started, "timings": timings}
        bench.record.put(**{name: row})
        return scores, folder

    expected, reference = evaluate("cpu", torch.device("cpu"), "fp32")
    for precision, (feature_limit, score_limit) in _LIMITS.items():
        scores, folder = evaluate(f"device {precision}", bench.device.torch, precision)
        bench.record.check(f"{precision}: features", feature_difference(folder, reference), feature_limit)
        for mode in MODES:
            bench.record.check(f"{precision}: {mode}", abs(scores[mode] - expected[mode]), score_limit)


def feature_difference(folder: Path, reference: Path) -> float:
    """Norm of the difference of all features, relative to the norm of the reference."""
    squares, total = 0.0, 0.0
    theirs = {p.parent.name.rpartition("-")[0]: p for p in reference.glob("*/features.npy")}
    ours = {p.parent.name.rpartition("-")[0]: p for p in folder.glob("*/features.npy")}
    if not ours or set(ours) != set(theirs):
        return float("inf")
    for split, path in theirs.items():
        a, b = np.load(ours[split]).astype(np.float64), np.load(path).astype(np.float64)
        squares, total = squares + np.square(a - b).sum(), total + np.square(b).sum()
    return float(np.sqrt(squares / max(total, 1e-30)))
