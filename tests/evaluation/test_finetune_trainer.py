"""A finetuning has what a pretraining has: watchdog, skipped steps, speed, elastic resume, the average of masters."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from testkit.runs import Trainer, metrics

from maestro_scale.evaluation.finetune.predictor import build_predictor
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.interop.export import full_state
from maestro_scale.interop.pretrained import load_model
from tests.evaluation.conftest import FIELDS
from tests.evaluation.test_finetune import (
    EVALUATE,
    averages,
    command,
    evaluated,
    losses,
    numbers,
    validated,
)

pytestmark = pytest.mark.slow
ALL_CHECKPOINTS = Path(__file__).parents[1] / "testkit" / "all_checkpoints.py"
STEPS = 12


def stage(number: int) -> str:
    return f"deepspeed.zero_optimization.stage={number}"


@pytest.fixture(scope="module")
def arguments(fields) -> list[str]:
    return [f"--checkpoint={fields.model}", "--mode=finetune"]


@pytest.fixture(scope="module")
def uninterrupted(fields, arguments, tmp_path_factory) -> Path:
    """Directory of a finetuning on two ranks with ZeRO 3, undisturbed, with the rehearsal of a step."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    evaluated(fields, folder, folder / "out", *arguments, ranks=2, course=[stage(3)])
    return folder / "out" / "finetune"


def test_each_line_has_the_speed_and_due_ones_the_validation(uninterrupted):
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["dataset"] == "fields"
        assert line["samples_per_s"] == pytest.approx(8 / line["step_s"], rel=1e-6)
        assert line["data_wait_s"] >= 0
        assert line["peak_memory_gib"] > 0
        # The cost of a sample is known of pretraining only: no number rather than a wrong one.
        assert (line["tokens_per_s"], line["tflops"], line["mfu"]) == (None, None, None)
        assert line["skipped_steps"] == 0
    scores = {line["step"]: line["eval/validation"] for line in lines if "eval/validation" in line}
    assert scores == {v["step"]: v["score"] for v in validated(uninterrupted)}
    assert list(scores) == [2, 4, 6, 8, 10, 12]


def test_the_rehearsal_changes_nothing(fields, arguments, uninterrupted, tmp_path):
    course = [stage(3), "train.warmup_check=false"]
    evaluated(fields, tmp_path, tmp_path / "out", *arguments, ranks=2, course=course)
    other = tmp_path / "out" / "finetune"
    assert losses(other) == losses(uninterrupted)
    assert [m["grad_norm"] for m in metrics(other)] == [m["grad_norm"] for m in metrics(uninterrupted)]
    assert validated(other) == validated(uninterrupted)
    assert averages(other) == averages(uninterrupted)


def test_stopped_by_a_file_it_resumes_on_other_ranks_and_stages(fields, arguments, uninterrupted, tmp_path):
    folder = tmp_path / "out" / "finetune"
    folder.mkdir(parents=True)
    for number, (ranks, zero) in enumerate(((2, 3), (1, 0), (2, 1)), 1):
        (folder / "STOP").touch()  # stops after one step
        output = evaluated(fields, tmp_path, tmp_path / "out", *arguments, ranks=ranks, course=[stage(zero)])
        assert f"{folder}: stopped; resume with the same command" in output
        assert [m["step"] for m in metrics(folder)] == list(range(1, number + 1))
        assert not (folder / "STOP").exists()
        assert not (folder / "results.json").exists()
    evaluated(fields, tmp_path, tmp_path / "out", *arguments, course=[stage(2)])
    assert [m["step"] for m in metrics(folder)] == list(range(1, STEPS + 1))
    assert losses(folder) == pytest.approx(losses(uninterrupted), rel=1e-5)
    assert [v["step"] for v in validated(folder)] == [v["step"] for v in validated(uninterrupted)]
    assert numbers(folder)["value"] == pytest.approx(numbers(uninterrupted)["value"], abs=0.02)


@pytest.mark.parametrize(
    ("ranks", "zero", "precision"), [(1, 0, "fp32"), (2, 2, "bf16"), (2, 3, "bf16_weights")]
)
def test_the_average_is_of_the_fp32_masters_after_every_step(
    fields, arguments, tmp_path, ranks, zero, precision
):
    course = [stage(zero), f"train.precision={precision}", "train.steps=4", "evaluation.validations=2"]
    trainer = Trainer(fields.recipe(tmp_path), entry=ALL_CHECKPOINTS)
    code, output = trainer.run(
        None, ranks, *command(tmp_path / "out", *arguments, course=[*course, "checkpoint.every_steps=1"])
    )
    assert code == 0, output[-4000:]
    folder = tmp_path / "out" / "finetune"
    states = [p / "state" for p in sorted((folder / "checkpoints").iterdir())]
    assert len(states) == 4
    network = build_predictor(load_model(fields.model), "fields", target_loss_for(task_for(FIELDS)), 0, True)
    initial = dict(network.named_parameters())
    average = {name: p.detach().to(_dtype(precision)).double() for name, p in initial.items()}
    # The decay of step t is t / (9 + t) while that is less than evaluation.ema, 0.9.
    for decay, state in zip((1 / 10, 2 / 11, 3 / 12, 4 / 13), states, strict=True):
        weights = full_state(state)
        assert weights.keys() == average.keys()
        average = {name: decay * a + (1 - decay) * weights[name].double() for name, a in average.items()}
        found = full_state(state, "ema")
        for name, a in average.items():
            torch.testing.assert_close(found[name].double(), a, rtol=1e-5, atol=1e-8)
    if precision != "fp32":
        assert any(not torch.equal(w, w.bfloat16().float()) for w in full_state(states[-1]).values())
    # What is validated, and tested in the end, is that average.
    best = max(validated(folder), key=lambda v: (v["score"], -v["step"]))["step"]
    kept, whole = (
        load_file(folder / "best" / f"step_{best:08d}.safetensors"),
        full_state(states[best - 1], "ema"),
    )
    assert all(torch.equal(kept[name], tensor) for name, tensor in whole.items())


def _dtype(precision: str) -> torch.dtype:
    """Of the initial weights: with bf16 weights DeepSpeed casts the network before it makes the masters."""
    return torch.bfloat16 if precision == "bf16_weights" else torch.float32


def test_a_frozen_rank_ends_the_finetuning_and_is_named(fields, arguments, tmp_path):
    timeout_s, folder = 15, tmp_path / "out" / "finetune"
    course = [stage(3), "train.steps=100000", f"train.hang_timeout_s={timeout_s}"]
    trainer = Trainer(fields.recipe(tmp_path), entry=EVALUATE)
    job = trainer.start(None, 2, *command(tmp_path / "out", *arguments, course=course))
    deadline = time.monotonic() + 240
    while len(metrics(folder)) < 3:
        assert not any(p.poll() for p in job.processes), job.output[-4000:]
        assert time.monotonic() < deadline, job.output[-4000:]
        time.sleep(0.02)
    job.processes[1].send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    try:
        while job.processes[0].poll() is None:
            # The timeout, two looks at the heartbeats, and what a busy machine adds.
            assert time.monotonic() - frozen < 5 * timeout_s, job.output[-4000:]
            time.sleep(0.1)
    finally:
        output = job.output
        job.kill()
    assert job.processes[0].returncode == 3
    assert f"rank 0 made no progress for {timeout_s} s" in output
    assert "no heartbeat from rank 1 on" in output
    assert "the same command resumes" in output
    assert "File" in (folder / "hang" / "rank00000.txt").read_text()


def test_steps_that_are_not_finite_are_recorded_and_end_it(fields, arguments, tmp_path):
    # The first step makes every weight so large that no later loss is finite.
    course = ["optim.base_lr=1e30", "train.max_skipped=2", "evaluation.validations=1"]
    trainer = Trainer(fields.recipe(tmp_path), entry=EVALUATE)
    code, output = trainer.run(None, 1, *command(tmp_path / "out", *arguments, course=course))
    folder = tmp_path / "out" / "finetune"
    assert code == 2, output[-4000:]
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error")]
    assert error.startswith("error: 2 steps in a row were skipped")
    assert str(folder / "skipped") in error
    lines = metrics(folder)
    assert [(m["step"], m["skipped_steps"]) for m in lines] == [(1, 0), (2, 1), (3, 2)]
    assert [m["loss"] is None for m in lines] == [False, True, True]
    skipped = [json.loads(line) for line in (folder / "skipped" / "rank00000.jsonl").read_text().splitlines()]
    assert [s["step"] for s in skipped] == [2, 3]
    for record in skipped:
        assert record["reason"].startswith("the loss is ")
        assert [(b["finite"], len(b["keys"])) for b in record["batches"]] == [(False, 4), (False, 4)]
