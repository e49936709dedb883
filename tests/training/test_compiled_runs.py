"""Runs with ``model.compile``: the real trainer, ZeRO 2 and torch's default backend, which generates C++ on a CPU."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from testkit.runs import Trainer, metrics, write_recipe

pytestmark = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++"))), reason="torch.compile needs a C++ compiler on a CPU"
)
MODES = ("none", "blocks", "step")
STEPS = 50


def write_small_recipe(folder: Path, shards: Path) -> Path:
    """One sensor and few blocks: every kernel is a run of the C++ compiler. Two micro-batches a step."""
    path = write_recipe(folder, shards)
    recipe = yaml.safe_load(path.read_text())
    sensors = {"aerial": None, "s1_asc": None, "s1_des": None}
    recipe["data"]["mixture"][0]["sensors"] = {**sensors, "s2": {"num_dates": 2, "patch": 3}}
    recipe["data"]["workers"] = 0
    recipe["model"] |= {"inter_depth": 0}
    recipe["train"] |= {"steps": STEPS, "audit": False}
    recipe["checkpoint"] = {"every_steps": 100}
    # Everything that runs the model with other shapes than the steps.
    recipe["tracking"]["pictures_every"] = 10
    recipe["evaluation"] = {"every_steps": 20, "num_crops": 4}
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def runs(synthetic_shards, tmp_path_factory) -> tuple[Path, Trainer]:
    """A folder for runs, and their trainer. One cache of compiled kernels for all."""
    folder = tmp_path_factory.mktemp("compiled")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCH_LOGS": "recompiles"}
    return folder, Trainer(write_small_recipe(folder, synthetic_shards), env=env)


def run(runs: tuple[Path, Trainer], mode: str, precision: str) -> tuple[list[dict], str, dict]:
    """Metrics, output and environment.json of a run."""
    folder, trainer = runs
    run_dir = folder / f"{mode}-{precision}"
    changes = [f"model.compile={mode}", f"train.precision={precision}"]
    code, output = trainer.run(run_dir, 1, "--set", *changes, timeout_s=580)
    assert code == 0, output[-4000:]
    return metrics(run_dir), output, json.loads((run_dir / "environment.json").read_text())


@pytest.fixture(scope="module")
def eager(runs) -> list[dict]:
    return run(runs, "none", "fp32")[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["blocks", "step"])
def test_compiled_runs_follow_the_loss_curve_of_eager_mode(runs, eager, mode):
    lines, output, environment = run(runs, mode, "fp32")
    assert len(lines) == STEPS
    for ours, theirs in zip(lines, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert environment["compile"] == mode
    assert f"model.compile={mode}: compiled in" in output
    # Blocks: one of the encoder and one of the decoder, the second is a recompilation to torch. None comes later.
    first_step = output.index(f"step 1/{STEPS}")
    assert "Recompiling" not in output[first_step:]
    assert output.count("Recompiling function") == (1 if mode == "blocks" else 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_step_in_bf16_stays_close_to_eager_mode(runs):
    # Fused operations round to bf16 less often than eager ones.
    eager, compiled = ([m["loss"] for m in run(runs, mode, "bf16")[0]] for mode in ("none", "step"))
    assert compiled == pytest.approx(eager, rel=5e-3)
