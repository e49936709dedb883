"""Guarantees of a run, with real processes: the same curve for any layout and after any kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from testkit.runs import REPO, Trainer, audit, curve, metrics, write_recipe

from maestro_scale import datasets
from maestro_scale.interop.export import export_model
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.cost import num_parameters
from maestro_scale.recipe import build_model_config, load_recipe, resolve_spec
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.folder import newest
from maestro_scale.training.footprint import footprint

FIELDS = {
    "step",
    "time",
    "epoch",
    "samples",
    "loss",
    "loss/aerial",
    "loss/s2",
    "loss/s1_asc",
    "loss/s1_des",
    "explained/aerial",
    "explained/s2",
    "explained/s1_asc",
    "explained/s1_des",
    "lr",
    "grad_norm",
    "samples_per_s",
    "data_wait_s",
    "step_s",
    "tokens_per_s",
    "tflops",
    "mfu",
    "peak_memory_gib",
    "skipped_steps",
}


@pytest.fixture(scope="module")
def trainer(synthetic_shards, tmp_path_factory) -> Trainer:
    return Trainer(write_recipe(tmp_path_factory.mktemp("recipe"), synthetic_shards))


@pytest.mark.slow
def test_under_the_deepspeed_launcher(trainer, uninterrupted, tmp_path):
    launched = Trainer(trainer.recipe, "deepspeed")
    lines = launched.train(tmp_path / "run", 2, "--set", "train.micro_batch=2")
    assert curve(lines) == pytest.approx(curve(uninterrupted[1]), rel=1e-5)
    setup = json.loads((tmp_path / "run" / "environment.json").read_text())["setup"]
    assert (setup["launcher"], setup["ranks"], setup["nodes"]) == ("deepspeed", 2, 1)


@pytest.fixture(scope="module")
def uninterrupted(trainer, tmp_path_factory):
    """One rank, one micro-batch, uninterrupted: (run directory, metrics)."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return run_dir, trainer.train(run_dir, 1, "--set", "train.micro_batch=8")


@pytest.mark.slow
def test_run_directory_is_complete(trainer, uninterrupted, tmp_path):
    run_dir, lines = uninterrupted
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    assert all(set(m) >= FIELDS for m in lines)
    assert lines[-1]["data/replaced"] == 0
    assert lines[-1]["samples"] == 48
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["versions"]["torch"]
    setup = environment["setup"]
    assert (setup["launcher"], setup["ranks"], setup["nodes"], setup["device"]) == (
        "environment",
        1,
        1,
        "cpu",
    )
    shards = load_recipe(trainer.recipe).data.mixture[0].shards
    digest = hashlib.sha256(Path(shards, "manifest.json").read_bytes()).hexdigest()
    assert environment["datasets"] == {"treesatai_ts": digest}
    assert commit.read(newest(run_dir))["datasets"] == {"treesatai_ts": digest}
    config = json.loads((export_model(newest(run_dir), tmp_path) / "config.json").read_text())
    assert config["trained"]["datasets"] == {"treesatai_ts": digest}
    assert (run_dir / "recipe.yaml").exists()
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    assert all((p / commit.MARKER).exists() for p in (run_dir / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage", "micro"), [(1, 0, 2), (2, 1, 4), (2, 2, 1), (2, 3, 2)])
def test_the_curve_does_not_depend_on_ranks_micro_batches_or_stage(
    trainer, uninterrupted, tmp_path, ranks, stage, micro
):
    changes = [f"train.micro_batch={micro}", f"deepspeed.zero_optimization.stage={stage}"]
    lines = trainer.train(tmp_path / "run", ranks, "--set", *changes)
    assert curve(lines) == pytest.approx(curve(uninterrupted[1]), rel=1e-5)
    assert [m["grad_norm"] for m in lines] == pytest.approx(
        [m["grad_norm"] for m in uninterrupted[1]], rel=1e-3
    )
    assert audit(tmp_path / "run") == audit(uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(trainer, tmp_path, ranks, stage):
    changes = ["--set", f"deepspeed.zero_optimization.stage={stage}", "train.micro_batch=2", "train.steps=16"]
    whole = trainer.train(tmp_path / "whole", ranks, *changes, "tracking.pictures_every=8")
    assert len(list((tmp_path / "whole" / "pictures").iterdir())) == 2, "and drawing them changes nothing"
    trainer.kill_at(tmp_path / "killed", ranks, 5, *changes)
    assert metrics(tmp_path / "killed")[-1]["step"] < 16, "the run was over before it was killed"
    resumed = trainer.train(tmp_path / "killed", ranks, *changes)
    assert [m["step"] for m in resumed] == list(range(1, 17))
    assert curve(resumed) == curve(whole)
    assert audit(tmp_path / "killed") == audit(tmp_path / "whole")
    states = []
    for run in ("whole", "killed"):
        out = export_model(newest(tmp_path / run), tmp_path / f"{run}-model")
        states.append(load_model(out).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.slow
def test_a_finished_run_is_left_unchanged(trainer, uninterrupted):
    run_dir, lines = uninterrupted
    code, output = trainer.run(run_dir, 1, "--set", "train.micro_batch=8")
    assert code == 0
    assert "done: 6 steps" in output
    assert [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == lines


def test_stop_file_ends_a_run_that_then_resumes(trainer, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    code, output = trainer.run(run_dir, 1, "--set", "train.micro_batch=8")
    assert code == 0, output[-3000:]
    assert "resume with the same command" in output
    assert newest(run_dir).name == "step_00000001"
    assert not (run_dir / "STOP").exists()
    assert curve(trainer.train(run_dir, 1, "--set", "train.micro_batch=8")) == curve(uninterrupted[1])


@pytest.mark.slow
def test_a_signal_while_it_starts_stops_it_after_a_step(trainer, uninterrupted, tmp_path):
    job = trainer.start(tmp_path / "run", 1, "--set", "train.micro_batch=8")
    deadline = time.monotonic() + 60
    # Its handlers are there before torch is: the first thing that it does.
    while not _catches_sigterm(job.processes[0].pid):
        assert time.monotonic() < deadline, job.output[-3000:]
        time.sleep(0.01)
    assert not (tmp_path / "run").exists(), "it had begun already"
    job.processes[0].send_signal(signal.SIGTERM)
    assert job.wait(120) == 0, job.output[-3000:]
    assert "stopped by SIGTERM after step 1" in job.output
    assert newest(tmp_path / "run").name == "step_00000001"


def _catches_sigterm(pid: int) -> bool:
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_a_checkpoint_with_changed_contents_is_skipped(trainer, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run_dir)
    (file,) = (newest(run_dir) / "state").glob("rank*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, output = trainer.run(run_dir, 2)
    assert code == 0, output[-3000:]
    assert f"{newest(run_dir).name}: state/{file.name} has changed since it was written" in output
    assert curve(metrics(run_dir)) == pytest.approx(curve(uninterrupted[1]), rel=1e-5)
    assert commit.problem(newest(run_dir), hashes=True) is None


OFFLOADED = ["model.width=16384", "model.heads=128", "model.depth=90"]
OFFLOADED += ["deepspeed.zero_optimization={stage: 2, offload_optimizer: {device: cpu}}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "changes", "words"),
    [
        (1, ["train.global_bach=8"], ["train.global_bach", "global_batch"]),
        (2, ["data.lanes=1"], ["lanes", "2 ranks"]),
        (1, ["data.mixture[0].shards=/nowhere/at/all"], ["/nowhere/at/all"]),
        (1, ["data.mixture[0].split=nope"], ["nope", "train"]),
        (1, OFFLOADED, ["offload needs", "GiB of memory per node", "GiB free"]),
    ],
)
def test_mistakes_end_with_one_line(trainer, tmp_path, ranks, changes, words):
    code, output = trainer.run(tmp_path / "run", ranks, "--set", *changes)
    assert code != 0
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len({e.split(": ", 1)[1] for e in errors}) == 1, output[-3000:]
    assert all(word in errors[0] for word in words), errors
    assert "Traceback" not in output, output[-3000:]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_resuming_with_another_seed_is_refused(trainer, uninterrupted):
    run_dir, _ = uninterrupted
    code, output = trainer.run(run_dir, 1, "--set", "train.micro_batch=8", "seed=4")
    assert code != 0
    assert "seed: checkpoint 3, now 4" in output
    code, output = trainer.run(run_dir, 1, "--set", "train.micro_batch=8", "optim.base_lr=0.5")
    assert code != 0
    assert "optim.base_lr: checkpoint 0.001, now 0.5" in output


def _with_another_divisor(shards: Path, folder: Path) -> Path:
    """The same shards, with one digit of the manifest changed."""
    shutil.copytree(shards, folder, copy_function=os.symlink)
    text = (shards / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    (folder / "manifest.sha256").unlink()
    (folder / "manifest.json").write_text(text.replace('"divisor": 255.0', '"divisor": 254.0', 1))
    assert text != (folder / "manifest.json").read_text()
    return folder


@pytest.mark.slow
def test_a_manifest_that_differs_in_one_digit_is_refused(trainer, uninterrupted, synthetic_shards, tmp_path):
    changed = _with_another_divisor(synthetic_shards, tmp_path / "rank1")
    (tmp_path / "rank0").symlink_to(synthetic_shards)
    code, output = trainer.run(
        uninterrupted[0], 1, "--set", "train.micro_batch=8", f"data.mixture[0].shards={changed}"
    )
    assert code == 2
    assert "does not fit this run: data.manifests.0: checkpoint" in output
    # One rank of two: nothing else would notice, and the two would train on different inputs.
    code, output = trainer.run(
        tmp_path / "run", 2, "--set", f"data.mixture[0].shards={tmp_path}/rank${{RANK}}"
    )
    assert code == 2, output[-3000:]
    (line,) = [x for x in output.splitlines() if x.startswith("error")]
    assert "treesatai_ts: the ranks have read different manifests" in line
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_fewer_steps_than_taken_are_refused(trainer, uninterrupted):
    code, output = trainer.run(uninterrupted[0], 1, "--set", "train.micro_batch=8", "train.steps=3")
    assert code != 0
    assert "has made 6 steps and the recipe asks for 3" in output


@pytest.mark.slow
def test_a_longer_schedule_is_followed_after_resuming(trainer, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    trainer.train(run_dir, 1, "--set", "train.micro_batch=8")
    (run_dir / "checkpoints" / "mine").mkdir()
    longer = trainer.train(run_dir, 1, "--set", "train.micro_batch=8", "train.steps=12")
    fresh = trainer.train(tmp_path / "fresh", 1, "--set", "train.micro_batch=8", "train.steps=12")
    assert [m["lr"] for m in longer[6:]] == [m["lr"] for m in fresh[6:]]
    assert (run_dir / "checkpoints" / "mine").exists(), "a folder that is not ours was removed"


@pytest.mark.slow
def test_a_run_directory_that_cannot_be_used_is_one_line(trainer, tmp_path):
    (tmp_path / "file").touch()
    code, output = trainer.run(tmp_path / "file")
    assert code != 0
    assert f"error: cannot use {tmp_path / 'file'} as run directory: " in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_fresh_refuses_a_directory_with_a_run(trainer, uninterrupted):
    code, output = trainer.run(uninterrupted[0], 1, "--fresh", "--set", "train.micro_batch=8")
    assert code != 0
    assert "--fresh" in output


@pytest.mark.slow
def test_dry_run_needs_no_data(tmp_path):
    code, output = Trainer(REPO / "recipes" / "vitl.yaml", "deepspeed").run(None, 1, "--dry-run")
    assert code == 0, output[-3000:]
    for words in ("parameters", "898,", "aerial", "225", "GFLOP", "stage", "GiB per rank"):
        assert words in output, output
    recipe = load_recipe(REPO / "recipes" / "vitl.yaml")
    spec = resolve_spec(datasets.spec("treesatai_ts"), recipe.data.mixture[0])
    parameters = num_parameters(build_model_config(recipe, [spec]))
    held = footprint(parameters, 8, recipe.deepspeed_config(8, "cuda"), 96 // (6 * 8), recipe.optim.ema > 0)
    row = re.search(r"2 \(recipe\) .* ([\d.]+) ", output)
    activations = re.search(r"([\d.]+) GiB activations", output)
    assert row is not None, output
    assert activations is not None, output
    # And the batches of two steps, 24 samples of 0.4 MB.
    expected = held.device / 2**30 + float(activations[1]) + 24 * 0.4e6 / 2**30
    assert float(row[1]) == pytest.approx(expected, abs=0.02)
