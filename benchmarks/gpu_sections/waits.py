"""Section: where a training step waits for the device, by torch's sync debug mode."""

from __future__ import annotations

from collections import Counter

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import Case, case_recipe
from benchmarks.gpu_sections.device import Wait
from benchmarks.gpu_sections.training import WaitHook, run_on_mock_batch

_MOST = 2  # of our own per step: the guard's decision, and the flags
_STEPS_BEFORE = 4  # DeepSpeed allocates in the first ones


def run(bench: Bench) -> None:
    """Record one step per ZeRO stage and number of micro-batches."""
    for stage, num_micro_batches in ((2, 1), (2, 2), (1, 1), (0, 1), (3, 1))[: bench.pick(5, 2)]:
        micro_batch = bench.pick(6, 2)
        recipe = case_recipe(
            Case("treesatai_ts", "base", micro_batch),
            bench.rehearse,
            f"train.global_batch={micro_batch * num_micro_batches}",
            f"deepspeed.zero_optimization.stage={stage}",
        )
        hook = WaitHook(bench.device, after=bench.pick(_STEPS_BEFORE, 1))
        name = f"ZeRO {stage}, {num_micro_batches} micro-batches"
        run_on_mock_batch(bench, recipe, f"waits-{stage}-{num_micro_batches}", [hook])
        bench.record.put(**{name: describe(hook.waits)})
        if bench.device.is_gpu:
            check(bench, name, hook.waits)
        else:
            bench.record.unavailable(f"{name}: waits of maestro_scale")


def check(bench: Bench, name: str, waits: list[Wait]) -> None:
    """At most two of our own, none in the backward pass."""
    ours = [w for w in waits if w.owner == "maestro_scale"]
    where = ", ".join(sorted({w.place for w in ours}))
    bench.record.check(f"{name}: waits of maestro_scale", len(ours), _MOST, where)
    backward = [w for w in waits if w.backward]
    where = ", ".join(sorted({w.place for w in backward}))
    bench.record.check(f"{name}: waits in the backward pass", len(backward), 0, where)


def describe(waits: list[Wait]) -> dict[str, int]:
    """{owner, place, and the line of ours that led there: number}."""
    return dict(Counter(f"{w.owner} {w.place}" + (f" from {w.called}" if w.called else "") for w in waits))
