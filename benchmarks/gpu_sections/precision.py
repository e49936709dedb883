"""Sections: loss curves by precision, and by ZeRO stage, on the same data in the same order."""

from __future__ import annotations

import time

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import small_recipe
from benchmarks.gpu_sections.data import write_synthetic
from benchmarks.gpu_sections.record import max_relative
from benchmarks.gpu_sections.training import losses, run_on_shards

# bf16_weights is known to lag in the warm-up, where an update is smaller than half a unit of the rounded weights.
_LIMITS = {"bf16": 1e-3, "bf16_weights": 0.05}
_ZERO = 2e-3


def run_curves(bench: Bench) -> None:
    """fp32, bf16 by autocast and bf16 weights."""
    num_steps = bench.pick(200, 3)
    shards = write_synthetic(bench.work, "treesatai_ts", {"train": bench.pick(64, 8)})
    curves: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16", "bf16_weights"):
        started = time.monotonic()
        recipe = small_recipe(
            shards, bench.work, bench.rehearse, *_length(bench, num_steps), f"train.precision={precision}"
        )
        curves[precision] = losses(run_on_shards(bench, recipe, f"curve-{precision}"))
        bench.record.put(curves=curves)
        if precision in _LIMITS:
            difference = max_relative(curves[precision], curves["fp32"])
            bench.record.check(f"{precision} against fp32", difference, _LIMITS[precision])
            # An equal curve would mean that the precision has no effect.
            bench.record.expect(f"{precision} differs from fp32", curves[precision] != curves["fp32"])
        # Each takes about as long as the one before.
        if time.monotonic() - started > bench.record.left_s and precision != "bf16_weights":
            bench.record.unavailable("the other precisions", "no time left")
            return


def run_zero(bench: Bench) -> None:
    """ZeRO 0 to 3 at the device's own precision."""
    num_steps = bench.pick(30, 2)
    shards = write_synthetic(bench.work, "treesatai_ts", {"train": bench.pick(64, 8)})
    curves: dict[int, list[float]] = {}
    for stage in range(4):
        recipe = small_recipe(
            shards,
            bench.work,
            bench.rehearse,
            *_length(bench, num_steps),
            f"deepspeed.zero_optimization.stage={stage}",
        )
        curves[stage] = losses(run_on_shards(bench, recipe, f"zero-{stage}"))
        bench.record.put(curves=curves)
    for stage in (1, 2, 3):
        bench.record.check(f"ZeRO {stage} against ZeRO 0", max_relative(curves[stage], curves[0]), _ZERO)


def _length(bench: Bench, num_steps: int) -> tuple[str, ...]:
    batch = bench.pick(16, 2)
    return (f"train.steps={num_steps}", f"train.global_batch={batch}", f"train.micro_batch={batch // 2}")
