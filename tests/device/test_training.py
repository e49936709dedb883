"""Pretraining on the simulated device, with the real DeepSpeed: where the host waits, what is copied, and when.

The runs are in ``training.py``: two datasets with different sensors, two micro-batches a step.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from testkit.simulated.recorder import COPY, KERNEL, MIX, RACE, STREAM, SYNC
from testkit.simulated.steps import (
    DECISION,
    FLAGS,
    STEP,
    is_constant,
    of_project,
    run_script,
    steps_of,
    violations,
)

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("training.py")
# Host synchronisations outside of steps: (phase, file, function).
OTHERS = {
    ("setup", "maestro_scale/training/assembly.py", "_build_engine"),  # the weights
    ("setup", "maestro_scale/evaluation/in_loop.py", "evaluation_hooks"),  # a copy of the encoder
    ("resume", "maestro_scale/training/checkpoint/state.py", "restore"),
    ("log", "maestro_scale/training/device.py", "synchronize"),  # before the clock is read
    ("log", "maestro_scale/training/objectives.py", "loss_metrics"),
    ("pictures", "maestro_scale/training/hooks/pictures.py", "_view"),
    ("checkpoint", "maestro_scale/training/fragments.py", "adam_step"),
    ("checkpoint", "maestro_scale/training/checkpoint/state.py", "pieces"),
    ("in-loop evaluation", "maestro_scale/stream/device_copy.py", "wait"),  # for the features of a batch
    ("in-loop evaluation", "maestro_scale/evaluation/probes/knn.py", "knn"),
    ("in-loop evaluation", "maestro_scale/evaluation/probes/linear.py", "linear_probe"),
    ("in-loop evaluation", "maestro_scale/evaluation/probes/linear.py", "_minimise"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, synthetic_shards) -> dict[str, dict]:
    return run_script(SCRIPT, tmp_path_factory.mktemp("simulated"), synthetic_shards)


HEALTHY = ["full", "resumed", "stage 0", "stage 1", "stage 3", "bf16"]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_step_waits_twice_after_the_kernels_of_the_optimizer_are_queued(name, found):
    steps = steps_of(found[name]["records"])
    assert len(steps) in (2, 4, 8)
    for step in steps:
        waits = step.own_waits
        assert [(r.file, r.function) for r in waits] == [DECISION, FLAGS], [str(r) for r in waits]
        updates = [
            i for i, r in enumerate(step.records) if r.kind == KERNEL
        ]  # AdamW's: others are not recorded
        assert updates[-1] < step.records.index(waits[0])


@pytest.mark.parametrize("name", HEALTHY)
def test_no_operation_mixes_devices_and_no_stream_races(name, found):
    assert [str(r) for r in found[name]["records"] if r.kind in (MIX, RACE)] == []


@pytest.mark.parametrize("name", HEALTHY)
def test_each_micro_batch_is_one_asynchronous_copy_on_another_stream(name, found):
    for step in steps_of(found[name]["records"]):
        copies = [r for r in step.records if r.phase == "copy" and r.kind == COPY]
        assert len(copies) == 2 * (not step.is_last)  # of the next step
        assert all(r.stream != 0 and "pinned" in r.detail for r in copies)
        others = [r for r in step.records if r.phase in STEP and r.op == "host to device" and of_project(r)]
        assert [str(r) for r in others if r not in copies and not (step.is_first and is_constant(r))] == []
        waits = [
            r
            for r in step.records
            if r.kind == STREAM and r.op == "wait" and r.phase in STEP and of_project(r)
        ]
        assert [r.stream for r in waits] == [0] * (not step.is_last)


def test_the_host_waits_elsewhere_only_where_values_are_shown_or_stored(found):
    records = [r for name in ("full", "resumed") for r in found[name]["records"]]
    others = [r for r in records if r.kind == SYNC and r.phase not in {*STEP, "warm-up"} and of_project(r)]
    assert {(r.phase, r.file, r.function) for r in others if not is_constant(r)} == OTHERS


def test_results_are_those_of_a_cpu(found):
    losses = found["cpu"]["losses"]
    assert len(losses) == 3  # the first and the last step, and the first one of the second dataset
    for name in ("stage 0", "stage 1", "stage 3"):
        assert found[name]["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["bf16"]["losses"] == pytest.approx(losses, rel=5e-3)
    assert found["bf16"]["losses"] != losses


def test_a_run_resumes_pictures_and_scores_come_with_it(found):
    full, resumed = found["full"], found["resumed"]
    assert (full["reason"], full["step"]) == (resumed["reason"], resumed["step"] - 2) == ("done", 8)
    assert list(resumed["scores"]) == ["5", "10"]
    assert set(full["datasets"].values()) == {"treesatai_ts#0", "treesatai_ts#1"}
    assert {r.phase for r in resumed["records"]} >= {"resume", "pictures", "in-loop evaluation", "checkpoint"}


def test_healthy_runs_have_no_violation(found):
    assert [v for name in HEALTHY for v in violations(found[name]["records"])] == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("item", "sync _local_scalar_dense"), ("list", "sync host to device"), ("mix", "mix aten.add")],
)
def test_one_mistake_in_the_step_is_reported_with_file_and_line(name, kind, found):
    lines = violations(found[name]["records"])
    assert any(kind in line and found[name]["place"] in line for line in lines), lines
    assert all(found[name]["place"] in line for line in lines), lines


def test_a_batch_that_is_used_before_its_copy_has_arrived_is_reported(found):
    lines = violations(found["no wait"]["records"])
    assert any("race" in line and "may not have written yet" in line for line in lines), lines[:5]


# What DeepSpeed 0.19.8 adds: {run: {(phase, file, function)}}, on one rank. The run "full" is at stage 2.
_ZERO = "deepspeed/runtime/zero/"
DEEPSPEED = {
    "stage 0": set(),
    "stage 1": set(),
    "full": set(),
    "stage 3": {
        # After each micro-batch.
        ("backward", f"{_ZERO}stage3.py", "independent_gradient_partition_epilogue"),
        # When the order of modules has changed, as between two datasets of a mixture.
        ("forward", f"{_ZERO}utils.py", "assert_lst_len_same_as_other_ranks"),
        ("forward", f"{_ZERO}utils.py", "get_lst_from_rank0"),
        # Only on one rank, where no parameter has to be gathered.
        ("forward", f"{_ZERO}partition_parameters.py", "wait"),
        ("backward", f"{_ZERO}partition_parameters.py", "wait"),
        ("optimizer", f"{_ZERO}partition_parameters.py", "wait"),
    },
}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_what_deepspeed_adds_to_a_step(name, found):
    records = [r for step in steps_of(found[name]["records"]) for r in step.records]
    added = [r for r in records if r.kind == SYNC and not of_project(r) and r.phase in STEP]
    assert {(r.phase, r.file, r.function) for r in added} == DEEPSPEED[name]
