"""The model against an unfused formulation of it, in double precision: one loss, one gradient.

``benchmarks/reference_step.py`` computes attention, patches, masks and loss another way, on the same parameters.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import full_batch, small_config, small_sensors

from benchmarks.reference_step import host_masks, reference_loss
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import Mask, MaskingConfig, draw_masks, num_masked
from maestro_scale.training.objectives import hidden_counts


def gradient(model: Maestro, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion": "mod", "spectral": "token"},
        {"fusion": "monotemp", "loss": "l2"},
        {"fusion": "shared", "norm": "token"},
        {"target": "patch", "inter_depth": 0},
        {"target": "none", "checkpointing": "blocks"},
        {"spectral": "token", "norm": "token", "loss": "l2"},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "default",
)
def test_gradients_equal_those_of_the_unfused_formulation(changes):
    config = small_config(**changes)
    model, batch = Maestro(config).initialise(0).double(), full_batch(config, 3)
    masks = draw_masks(config, MaskingConfig(), batch)
    loss, _ = model(batch, masks, hidden_counts(config, [masks]))
    ours = gradient(model, loss)
    expected = reference_loss(model, batch, MaskingConfig(), {k: m.masked for k, m in masks.items()})
    theirs = gradient(model, expected)
    # Positions and targets are made in single precision on both sides, in another order.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm() + 1e-12, name


def test_gradients_equal_finite_differences():
    config = small_config(sensors=small_sensors()[1:2], inter_depth=0, loss="l2")
    model, batch = Maestro(config).initialise(0).double(), full_batch(config, 2)
    masks = draw_masks(config, MaskingConfig(), batch)
    counts = hidden_counts(config, [masks])
    analytic = gradient(model, model(batch, masks, counts)[0])
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                p.add_(direction, alpha=sign * 1e-6)
                values.append(model(batch, masks, counts)[0].item())
                p.sub_(direction, alpha=sign * 1e-6)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((analytic[name] * direction).sum().item(), rel=1e-4, abs=1e-8), name


def test_the_reference_masks_as_many_tokens():
    config = small_config()
    model, batch = Maestro(config).initialise(0), full_batch(config, 16)
    for name, hidden in host_masks(model, batch, MaskingConfig()).items():
        assert (hidden.sum(1) == num_masked(0.75, hidden.shape[1])).all(), name


def test_a_sequence_of_one_token_masks_none_and_still_trains():
    one = dataclasses.replace(small_sensors()[1], image_size=2, patch=2, num_dates=1)
    config = small_config(sensors=(one, small_sensors()[0]))
    model, batch = Maestro(config).initialise(0), full_batch(config, 2)
    masks = draw_masks(config, MaskingConfig(), batch)
    assert isinstance(masks["s2"], Mask)
    assert not masks["s2"].masked.any()
    loss, _ = model(batch, masks, hidden_counts(config, [masks]))
    loss.backward()
    assert loss.isfinite()
