"""``train.deterministic``: what it sets, what it refuses, and that results on a CPU do not depend on it."""

from __future__ import annotations

import os

import pytest
import torch
from testkit.runs import Trainer, curve, write_recipe

from maestro_scale.recipe import RecipeError, load_recipe
from maestro_scale.training.determinism import configure_determinism


@pytest.fixture
def recipe(synthetic_shards, tmp_path):
    return write_recipe(tmp_path, synthetic_shards, workers=0)


HAS_SETTING = hasattr(torch._inductor.config, "deterministic")  # not before torch 2.9


@pytest.fixture
def restored(monkeypatch):
    if HAS_SETTING:
        monkeypatch.setattr(torch._inductor.config, "deterministic", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    configure_determinism(False)


def test_deterministic_algorithms_are_required_not_asked_for(restored):
    configure_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not HAS_SETTING or torch._inductor.config.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    configure_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.mark.parametrize("kernel", ["cudnn", "flash_attn"])
def test_a_kernel_without_a_deterministic_backward_pass_is_refused(recipe, kernel):
    load_recipe(recipe, [f"model.attention={kernel}"])
    with pytest.raises(RecipeError, match=f"model.attention: '{kernel}' has no deterministic backward pass"):
        load_recipe(recipe, [f"model.attention={kernel}", "train.deterministic=true"])


@pytest.mark.slow
def test_a_run_on_a_cpu_does_not_depend_on_it(recipe, tmp_path):
    trainer = Trainer(recipe)
    curves = [
        curve(trainer.train(tmp_path / name, 1, "--set", f"train.deterministic={name}", "train.steps=3"))
        for name in ("true", "false")
    ]
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]
