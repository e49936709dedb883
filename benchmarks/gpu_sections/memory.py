"""Section: peak memory of a training step against the estimate of ``maestro-scale plan``."""

from __future__ import annotations

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import MEMORY_CASES, case_recipe, rehearsed
from benchmarks.gpu_sections.estimate import estimate
from benchmarks.gpu_sections.record import relative
from benchmarks.gpu_sections.training import StepClock, run_on_mock_batch

_LIMIT = 0.1


def run(bench: Bench) -> None:
    """Measure a few steps of each case."""
    for case in rehearsed(MEMORY_CASES, 2) if bench.rehearse else MEMORY_CASES:
        if bench.record.left_s < 8 and not bench.rehearse:
            bench.record.unavailable(case.title, "no time left")
            continue
        recipe = case_recipe(case, bench.rehearse)
        planned = estimate(bench, recipe)
        clock = StepClock(bench.device, bench.pick(3, 1), 1, bench.pick(3, 1), bench.record.ends_at)
        bench.free()
        run_on_mock_batch(bench, recipe, "memory", [clock])
        peak = clock.peak_bytes
        row = {"plan_bytes": planned and planned.device_bytes}
        row |= {"peak_bytes": peak, "reserved_bytes": clock.reserved_bytes}
        bench.record.put(**{case.title: row})
        if planned is None or peak is None:
            bench.record.unavailable(f"{case.title}: plan against peak")
        else:
            difference = relative(planned.device_bytes, peak)
            gib = f"plan {planned.device_bytes / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB"
            bench.record.check(f"{case.title}: plan against peak", difference, _LIMIT, gib)
