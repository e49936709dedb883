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
from maestro_scale.evaluation.benchmark import Benchmark
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.model.maestro import Maestro

MODES = ("knn", "probe")
# bf16 products in the encoder: 8 bits of mantissa. A score changes where a tile is close to a threshold.
_FEATURES, _SCORE = 2e-2, 1e-2


def run(bench: Bench) -> None:
    """Evaluate on both and compare."""
    sizes = {split: bench.pick(full, 6) for split, full in (("train", 256), ("val", 64), ("test", 64))}
    shards = write_synthetic(bench.work, "treesatai_ts", sizes)
    recipe = small_recipe(shards, bench.work, bench.rehearse)
    model = Maestro(config_of(recipe)).initialise(0)
    scores, folders = {}, {}
    for name, device in (("cpu", torch.device("cpu")), ("device", bench.device.torch)):
        folders[name] = bench.work / "features" / name
        benchmark = Benchmark(specs_of(recipe)[0], str(shards), bench.work / "cache", folders[name])
        started = time.perf_counter()
        results = evaluate_frozen(
            model, benchmark, MODES, world=dataclasses.replace(bench.world, device=device)
        )
        scores[name] = {r.mode: r.value for r in results}
        timings = {f"{r.mode} {what}": value for r in results for what, value in r.timings.items()}
        seconds = time.perf_counter() - started
        bench.record.put(**{name: {"scores": scores[name], "seconds": seconds, "timings": timings}})
    difference = feature_difference(folders["device"], folders["cpu"])
    bench.record.check("features", difference, _FEATURES)
    for mode in MODES:
        bench.record.check(mode, abs(scores["device"][mode] - scores["cpu"][mode]), _SCORE)


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
