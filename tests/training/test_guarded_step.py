"""A step that the guard refuses changes nothing, at every ZeRO stage, without DeepSpeed's own check."""

from __future__ import annotations

import math

import pytest
import torch
from testkit.launch import launch, task

from maestro_scale.training.guard import Guard

STEPS, FIRST, LAST = 7, 0, -1  # numbers of parameters: a matrix, which decays, and a bias of the other group
POISON = [[1, 1, FIRST, "inf"], [0, 3, LAST, "nan"], [1, 4, LAST, "-inf"]]  # [rank, step, parameter, value]
BAD_PIXELS = [[1, 5]]
REFUSED = {
    1: "the gradient norm is inf",
    3: "the gradient norm is nan",
    4: "the gradient norm is inf",
    5: "the loss is nan",
}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def layouts() -> list[dict]:
    found = []
    for stage in range(4):
        for precision in ("fp32", "bf16", "bf16_weights"):
            for zero in ({}, OFFLOADED):
                if stage or (not zero and precision != "bf16_weights"):
                    name = f"{stage}-{precision}{'-offloaded' if zero else ''}"
                    found.append(task(stage, name, STEPS, precision=precision, zero=zero, accumulate=2))
    # Without clipping, as optim.clip 0 sets DeepSpeed's gradient_clipping.
    found += [task(s, f"{s}-unclipped", STEPS, precision="fp32", accumulate=2, clip=0.0) for s in range(4)]
    return found


@pytest.mark.slow
def test_after_a_refused_step_everything_is_bitwise_as_if_it_had_never_been_asked_for(tmp_path):
    """Master weights, moments, average, AdamW's step, the weights that compute, and the steps that follow, on two ranks
    with two micro-batches: the value is in the first one, so that it is in a gradient that the second adds to."""
    tasks = []
    for t in layouts():
        # Next to each other: DeepSpeed's stage 3 replaces torch's linear function for all later engines of a process.
        tasks.append({**t, "poison": POISON, "plant": BAD_PIXELS})
        tasks.append({**t, "name": f"{t['name']}-clean", "omit": sorted(REFUSED)})
    found = launch(tmp_path, 2, tasks)
    for t in layouts():
        name = t["name"]
        refused, never = found[name], found[f"{name}-clean"]
        reasons = {step: reason for step, reason in enumerate(refused["skipped"]) if reason}
        assert reasons == REFUSED, name
        made = [loss for step, loss in enumerate(refused["losses"]) if step not in REFUSED]
        assert made == never["losses"], name
        for part in ("state", "weights", "adam_step", "guard"):
            assert refused[part] == never[part], (name, part)
        assert refused["adam_step"] == STEPS - len(REFUSED), name
    # All stages leave out clipping alike, and it matters: the norms of the first steps are above the limit.
    unclipped = [found[f"{stage}-unclipped-clean"] for stage in range(4)]
    for run in unclipped[1:]:
        assert run["losses"] == pytest.approx(unclipped[0]["losses"], rel=1e-5)
    assert unclipped[0]["losses"] != pytest.approx(found["0-fp32-clean"]["losses"], rel=1e-5)


@pytest.mark.parametrize("seen", [99, 100])
def test_the_device_decides_as_the_host(seen):
    guard = Guard(spike=3.0, mean_loss=0.1, mean_norm=2.0, seen=seen)
    limit = 3.0 * 0.1  # in fp64: fp32 has no such number, so a comparison in fp32 would differ near it
    near = [float(torch.tensor(limit, dtype=torch.float32)), limit]
    near += [math.nextafter(limit, 0.0), math.nextafter(limit, 1.0)]
    losses = [*near, 0.1, 1e9, math.nan, math.inf, -math.inf, -1e9]
    for loss in losses:
        for norm in (0.0, 6.0, math.nextafter(6.0, 7.0), 1e30, math.nan, math.inf):
            for dtype in (torch.float32, torch.float64):
                as_given = torch.tensor([loss, norm], dtype=dtype)
                refused = guard.refuses(as_given[0], as_given[1])
                reason = guard.skip_reason(*as_given.tolist())
                assert refused.item() == (reason is not None), (loss, norm, dtype)


def test_without_a_limit_only_what_is_not_finite_is_refused():
    guard = Guard(spike=0.0, mean_loss=0.1, mean_norm=2.0, seen=1000)
    assert not guard.refuses(torch.tensor(1e30), torch.tensor(1e30))
    assert guard.refuses(torch.tensor(1.0), torch.tensor(math.inf))
