"""recipes/paper: a run follows the rules of the authors' code, by a loop that shares no optimizer code with it."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from testkit.runs import RECIPE, REPO, Trainer

from maestro_scale.interop.export import full_state
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import Mask, MaskingConfig, draw_masks
from maestro_scale.recipe import build_model_config, load_recipe
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.training.checkpoint.folder import newest
from maestro_scale.training.objectives import hidden_counts
from maestro_scale.training.pretrain import open_datasets

PAPER = REPO / "recipes" / "paper"
STEPS, BATCH = 30, 12
PEAK = 2e-3 * 2  # base_lr * sqrt(12 / 3); large, so that the decay of biases and norms shows within 30 steps
# Learning rates of some lines of the log over the peak, by hand. The peak is at step 0.2 * 30 - 1 = 5 of 0 … 29; the
# cosine rises from 1e-3, and falls to 1e-7: half way, at step 17, it is (1 + 1e-7) / 2.
FACTORS = {1: 1e-3, 6: 1.0, 18: 0.50000005, 30: 1e-7}


def factor(step: int) -> float:
    """Learning rate of a step, counted from 0, over the peak."""
    if step < 5:
        return 1 + (1e-3 - 1) * (1 + math.cos(math.pi * step / 5)) / 2
    return 1e-7 + (1 - 1e-7) * (1 + math.cos(math.pi * (step - 5) / 24)) / 2


def write_small(folder, shards):
    """A paper's recipe with a tiny model on few dates; everything else is as it ships."""
    tiny = yaml.safe_load(RECIPE.format(shards=f'"{shards}"', cache=f'"{folder}/cache"'))
    tiny["data"]["mixture"][0]["sensors"]["s2"]["scale"] = {"divisor": 500}
    recipe = {
        "extends": str(PAPER / "treesatai_ts_fusion_monotemp.yaml"),
        "name": "small",
        "data": {**tiny["data"], "workers": 0},
        # Large errors, so that the gradient's norm is above 1 and clipping would show.
        "model": {**tiny["model"], "inter_depth": 0, "target": "none", "loss": "l2"},
        "optim": {"base_lr": 2e-3},
        "train": {"epochs": None, "steps": STEPS, "global_batch": BATCH, "micro_batch": 6, "log_every": 1},
        "checkpoint": {"every_steps": 100},
        "tracking": tiny["tracking"],
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def masks_of(config, batch) -> dict[str, Mask]:
    """Tokens at random only: of each date of L tokens, exactly round(0.75 L) are masked."""
    masks = draw_masks(config, MaskingConfig(0.75, modality=0, date=0, location=0, band_group=0), batch)
    for sensor in config.sensors:
        assert (masks[sensor.name].masked.sum(1) == round(0.75 * sensor.grid**2)).all()
    return masks


@pytest.mark.slow
def test_a_course_of_30_steps_follows_the_rules_of_the_reference(synthetic_shards, tmp_path):
    path = write_small(tmp_path, synthetic_shards)
    lines = Trainer(path).train(tmp_path / "run", 1)
    assert len(lines) == STEPS
    for step, share in FACTORS.items():
        assert lines[step - 1]["lr"] == pytest.approx(PEAK * share, rel=1e-6)

    recipe = load_recipe(path)
    (dataset,) = open_datasets(recipe)
    config = build_model_config(recipe, [dataset.source.spec])
    model = Maestro(config).initialise(recipe.seed)
    loader = TrainLoader((dataset.source,), recipe.seed, 4, BATCH, BATCH, window=8)
    weights = dict(model.named_parameters())
    average = {name: p.detach().clone() for name, p in weights.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    largest = 0.0
    for data in loader.steps(0, STEPS):
        number = data.step
        masks = masks_of(config, data.batches[0])
        counts = hidden_counts(config, [masks])
        model.zero_grad()
        loss, sums = model(data.batches[0], masks, counts)
        loss.backward()
        line = lines[number - 1]
        assert line["loss"] == pytest.approx(loss.item(), rel=2e-4)
        for i, sensor in enumerate(config.sensors):
            explained = 1 - sums[i] / sums[len(config.sensors) + i]
            assert line[f"explained/{sensor.name}"] == pytest.approx(explained.item(), abs=1e-4)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in weights.values()))
        largest = max(largest, norm)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        # AdamW (0.9, 0.99), eps 1e-8; every parameter decays by 0.01 of the learning rate, no gradient is scaled.
        rate = PEAK * factor(number - 1)
        with torch.no_grad():
            for name, p in weights.items():
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.99 * second[name] + 0.01 * p.grad.square()
                step = first[name] / (1 - 0.9**number)
                scale = (second[name] / (1 - 0.99**number)).sqrt() + 1e-8
                p.copy_(p * (1 - 0.01 * rate) - rate * step / scale)
                if number % loader.steps_per_epoch == 0:  # momentum 1 - 1 / (0.2 * 100), once per epoch
                    average[name] = 0.95 * average[name] + 0.05 * p
    loader.close()
    assert largest > 2  # else clipping at 1 would change nothing
    state = newest(tmp_path / "run") / "state"
    found, averaged = full_state(state), full_state(state, "ema")
    for name, p in weights.items():
        assert rms(found[name] - p) < 2e-4, name
        assert rms(averaged[name] - average[name]) < 2e-4, name


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_rules_of_every_paper_recipe(path):
    recipe = load_recipe(path)
    optim, train = recipe.optim, recipe.train
    assert (optim.decay, optim.clip, optim.weight_decay, optim.betas) == ("all", 0.0, 0.01, (0.9, 0.99))
    assert (optim.schedule, optim.warmup, optim.start_div) == ("one_cycle", 0.2, 1e3)
    assert (train.spike, recipe.first_date, recipe.model.norm) == (0.0, "any", "group")
    assert recipe.has_structural_masks == (recipe.model.fusion in ("group", "mod"))
    # Once per epoch of the paper; 0.2 of its epochs are the time constant.
    tuned = path.stem.startswith("eval_")
    ema, every = (
        (recipe.evaluation.ema, recipe.evaluation.ema_epochs) if tuned else (optim.ema, optim.ema_epochs)
    )
    assert ema == pytest.approx(1 - 1 / (0.2 * train.epochs / every), abs=1e-5)
    assert (optim.base_lr, optim.final_div) == ((1e-5, 2) if tuned else (3e-5, 1e7))
