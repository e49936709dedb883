"""Rarely set keys of a recipe have the documented effect in a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from testkit.runs import Trainer, metrics, write_recipe

from maestro_scale import datasets
from maestro_scale.interop.export import export_model, write_model
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import build_model_config, load_recipe, resolve_spec
from maestro_scale.training.checkpoint.folder import newest
from tests.training.test_endurance import poisoned_shards

OBSERVED = Path(__file__).parents[1] / "testkit" / "observed.py"
SEED = 3  # of the tiny recipe


@pytest.fixture(scope="module")
def recipe(synthetic_shards, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), synthetic_shards, workers=0)


@pytest.mark.slow
def test_start_div_collect_every_and_every_minutes(recipe, tmp_path):
    run_dir, collected = tmp_path / "run", tmp_path / "collected"
    # A step takes 35 s by the run's clock.
    env = {"RUN_DIR": str(run_dir), "STEP_S": "35", "COLLECTED": str(collected)}
    changes = ["optim.start_div=50", "train.collect_every=3", "checkpoint.every_minutes=1"]
    changes += ["checkpoint.every_steps=100", "checkpoint.keep=9", "train.steps=8", "data.workers=0"]
    lines = Trainer(recipe, env=env, entry=OBSERVED).train(run_dir, 1, "--set", *changes)
    # base_lr 0.001 at a global batch of 8: the peak is 0.001 * sqrt(8 / 3) = 0.001632993; a 50th of it.
    assert lines[0]["lr"] == pytest.approx(3.265986e-5, rel=1e-6)
    # The peak is at step 0.2 * 8 - 1 = 0.6, the end at 7: (1 + cos(pi * 0.4 / 6.4)) / 2 = 0.990393 of the peak.
    assert lines[1]["lr"] == pytest.approx(0.001617304, rel=1e-6)
    # Before the steps 1, 2, 3 it is 0, 35 and 70 s after the start: over a minute, so a checkpoint follows step 3. Then
    # it is 0, 35 and 70 s after that, so one follows step 6. The last one follows the last step.
    found = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert found == ["step_00000003", "step_00000006", "step_00000008"]
    calls = [line.split() for line in collected.read_text().splitlines()]
    while_training = [(int(steps), automatic) for steps, automatic in calls if 0 < int(steps) < 8]
    assert while_training == [(3, "False"), (6, "False")]


@pytest.mark.slow
def test_max_skipped_steps_in_a_row_end_the_run(synthetic_raw, tmp_path):
    poisoned_shards(synthetic_raw, tmp_path / "shards", slice(None))
    trainer, run_dir = Trainer(write_recipe(tmp_path, tmp_path / "shards")), tmp_path / "run"
    code, output = trainer.run(run_dir, 1, "--set", "train.max_skipped=4", "checkpoint.every_steps=3")
    assert code == 2, output[-3000:]
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith("error: 4 steps in a row were skipped")
    assert str(run_dir / "skipped") in errors[0]
    assert "step_00000003" in errors[0]
    assert "Traceback" not in output
    lines = metrics(run_dir)
    assert [(m["step"], m["skipped_steps"], m["loss"]) for m in lines] == [
        (1, 1, None), (2, 2, None), (3, 3, None), (4, 4, None)
    ]  # fmt: skip
    assert (run_dir / "skipped" / "rank00000.jsonl").read_text().count("\n") == 4


def resolved(recipe):
    """The spec of the recipe's only dataset."""
    return resolve_spec(datasets.spec("treesatai_ts"), recipe.data.mixture[0])


def write_start(recipe: Path, folder: Path, *changes: str) -> dict[str, torch.Tensor]:
    """An untrained model of the recipe, with another seed than the run's; returns its weights."""
    loaded = load_recipe(recipe, list(changes))
    config = build_model_config(loaded, [resolved(loaded)])
    state = Maestro(config).initialise(SEED + 1).state_dict()
    write_model(folder, state, config, {})
    return state


def trained_weights(run_dir: Path, out: Path) -> dict[str, torch.Tensor]:
    return load_model(export_model(newest(run_dir), out)).state_dict()


# A learning rate so small that a step changes no weight by more than 1e-12.
NO_CHANGE = ("--set", "optim.base_lr=1e-20", "data.workers=0")


@pytest.mark.slow
def test_a_run_starts_from_an_equal_model_and_does_not_need_it_again(recipe, tmp_path):
    start = write_start(recipe, tmp_path / "start")
    trainer, run_dir = Trainer(recipe), tmp_path / "run"
    arguments = [*NO_CHANGE, f"model.init_from={tmp_path / 'start'}"]
    code, output = trainer.run(run_dir, 1, *arguments, "train.steps=1")
    assert code == 0, output[-3000:]
    assert "tiny starts from" in output
    assert " loaded " in output
    assert " initialised " not in output
    assert " unused " not in output
    found = trained_weights(run_dir, tmp_path / "first")
    assert found.keys() == start.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-12)
    shutil.rmtree(tmp_path / "start")
    code, output = trainer.run(run_dir, 1, *arguments, "train.steps=2")
    assert code == 0, output[-3000:]
    assert "starts from" not in output
    assert [m["step"] for m in metrics(run_dir)] == [1, 2]


@pytest.mark.slow
def test_a_run_starts_from_a_model_of_other_patches_and_depth(recipe, tmp_path):
    # The other model has aerial patches of 10 pixels instead of 20 and a block less in each encoder.
    start = write_start(recipe, tmp_path / "start", "data.mixture[0].sensors.aerial.patch=10")
    deeper = "model.depth=3"
    loaded = load_recipe(recipe, [deeper])
    initial = Maestro(build_model_config(loaded, [resolved(loaded)])).initialise(SEED)
    code, output = Trainer(recipe).run(
        tmp_path / "run", 1, *NO_CHANGE, deeper, f"model.init_from={tmp_path / 'start'}", "train.steps=1"
    )
    assert code == 0, output[-3000:]
    rows = [line for line in output.splitlines() if "patch_embed.aerial" in line]
    assert any(" resized " in row for row in rows)
    found, initial_state = trained_weights(tmp_path / "run", tmp_path / "model"), initial.state_dict()
    statuses = {"loaded": 0, "initialised": 0, "resized": 0}
    for name, tensor in found.items():
        other = start.get(name)
        if other is None:
            statuses["initialised"] += 1
            torch.testing.assert_close(tensor, initial_state[name], rtol=0, atol=1e-12)
        elif other.shape == tensor.shape:
            statuses["loaded"] += 1
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-12)
        else:
            statuses["resized"] += 1
            assert name.split(".")[:2] in (["patch_embed", "aerial"], ["to_pixels", "aerial"])
            assert tensor.dim() == 1 or not torch.allclose(
                tensor, initial_state[name], atol=1e-3
            )  # biases are 0
    assert all(statuses.values()), statuses


@pytest.mark.slow
def test_a_model_of_another_width_is_refused_in_one_line(recipe, tmp_path):
    write_start(recipe, tmp_path / "start", "model.width=64")
    code, output = Trainer(recipe).run(
        tmp_path / "run", 1, *NO_CHANGE, f"model.init_from={tmp_path / 'start'}", "train.steps=1"
    )
    assert code == 2, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert line.startswith(
        f"error: model.init_from={tmp_path / 'start'}: its encoder has width 64, this model's has width 32"
    )
    assert "Traceback" not in output
