"""Section: an interrupted and resumed training against an uninterrupted one."""

from __future__ import annotations

import math

from safetensors.torch import load

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import small_recipe
from benchmarks.gpu_sections.data import write_synthetic
from benchmarks.gpu_sections.record import max_relative
from benchmarks.gpu_sections.training import RequestStop, losses, run_on_shards, saved_state
from maestro_scale.training.stop import StopRequest

_ROUNDING = 1e-3  # of losses and weights after a few steps


def run(bench: Bench) -> None:
    """To rounding by default, and bitwise with ``train.deterministic``."""
    num_steps = bench.pick(20, 4)
    shards = write_synthetic(bench.work, "treesatai_ts", {"train": bench.pick(64, 8)})
    # Deterministic first: torch reads CUBLAS_WORKSPACE_CONFIG, which it sets, once per process.
    for deterministic in (True, False):
        name = "deterministic" if deterministic else "default"
        batch = bench.pick(16, 2)
        recipe = small_recipe(
            shards,
            bench.work,
            bench.rehearse,
            f"train.steps={num_steps}",
            f"train.global_batch={batch}",
            f"train.micro_batch={batch // 2}",
            f"train.deterministic={str(deterministic).lower()}",
        )
        through = run_on_shards(bench, recipe, f"through-{name}")
        stop = StopRequest()
        run_on_shards(bench, recipe, f"resumed-{name}", [RequestStop(stop, num_steps // 2)], stop)
        stopped_after = len(losses(bench.work / "runs" / f"resumed-{name}"))
        resumed = run_on_shards(bench, recipe, f"resumed-{name}")
        bench.record.expect(
            f"{name}: stopped half-way", stopped_after == num_steps // 2, f"step {stopped_after}"
        )
        a, b = losses(through), losses(resumed)
        state, other = saved_state(through), saved_state(resumed)
        bitwise = a == b and state == other
        difference = max(max_relative(b, a), state_difference(other, state))
        bench.record.put(**{name: {"bitwise": bitwise, "difference": difference}})
        if deterministic:
            bench.record.expect("deterministic: bitwise", bitwise, f"difference {difference:.2g}")
        else:
            bench.record.check("default: to rounding", difference, _ROUNDING)


def state_difference(state: dict[str, bytes], reference: dict[str, bytes]) -> float:
    """Norm of the difference of all weights and moments, relative to the norm of the reference."""
    if set(state) != set(reference):
        return math.inf
    squares, total = 0.0, 0.0
    for name, content in reference.items():
        ours, theirs = load(state[name]), load(content)
        for key, value in theirs.items():
            squares += float((ours[key].double() - value.double()).square().sum())
            total += float(value.double().square().sum())
    return math.sqrt(squares / max(total, 1e-30))
