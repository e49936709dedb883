"""Patches with invalid pixels (``Batch.nodata``) do not count in the loss, on any path and for any split."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import full_batch, small_config

from maestro_scale.model.embed import network_input, patchify
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks, masks_by_sensor
from maestro_scale.model.targets import normalise
from maestro_scale.stream.batch import Batch
from maestro_scale.training.objectives import hidden_counts


def with_nodata(config, batch: Batch, names: tuple[str, ...], share: float = 0.4) -> Batch:
    generator = torch.Generator().manual_seed(5)
    sensors = [s for s in config.sensors if s.name in names]
    nodata = {
        s.name: torch.rand(len(batch), s.num_dates, s.grid**2, generator=generator) < share for s in sensors
    }
    return dataclasses.replace(batch, nodata=nodata)


def cut(batch: Batch, rows: slice) -> Batch:
    fields = ("pixels", "dates", "noise", "targets", "nodata")
    parts = {f: {k: v[rows] for k, v in getattr(batch, f).items()} for f in fields}
    return dataclasses.replace(batch, **parts, ref_date=batch.ref_date[rows], keys=batch.keys[rows])


def expected_loss(model: Maestro, batch: Batch, masks) -> tuple[float, list[float]]:
    """Loss and counts, patch by patch."""
    config = model.config
    predictions, hidden = model.reconstruct(batch, masks), masks_by_sensor(config, masks)
    total, weights, counts = 0.0, 0.0, []
    for s in config.sensors:
        patches = patchify(network_input(s, batch.pixels[s.name]), s.patch).double()
        errors = (predictions[s.name] - normalise(config, s, patches)).abs()  # (B, D, L, P*P, C)
        groups = config.token_groups(s)
        by_group = hidden[s.name].unflatten(1, (len(groups), s.num_dates))
        where = torch.zeros(errors.shape, dtype=torch.bool)
        start = 0
        for i, bands in enumerate(groups):
            where[..., start : start + bands] = by_group[:, i, :, :, None, None]
            start += bands
        if s.name in batch.nodata:
            where &= ~batch.nodata[s.name][..., None, None]
        counts.append(float(where.sum()))
        if counts[-1]:
            weight = s.num_dates * s.grid**2
            total, weights = total + weight * errors[where].mean().item(), weights + weight
    return total / weights, counts


@pytest.mark.parametrize(
    ("fusion", "spectral", "names"),
    [
        ("group", "joint", ("s2", "s1_des")),
        ("shared", "joint", ("aerial", "s1_asc")),
        ("group", "token", ("s2",)),
        ("mod", "joint", ("aerial", "s2", "s1_asc", "s1_des")),
    ],
)
def test_the_loss_is_the_mean_over_masked_complete_patches_for_any_split(fusion, spectral, names):
    config = small_config(fusion=fusion, spectral=spectral)
    model = Maestro(config).initialise(0).double()
    batch = with_nodata(config, full_batch(config, 8), names)
    masks = draw_masks(config, MaskingConfig(), batch)
    counts = hidden_counts(config, [masks])
    loss, expected_counts = expected_loss(model, batch, masks)
    assert counts.tolist() == expected_counts

    def run(cuts: list[slice]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for rows in cuts:
            part = cut(batch, rows)
            share, _ = model(part, draw_masks(config, MaskingConfig(), part), counts)
            share.backward()
            total += share.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, gradient = run([slice(0, 8)])
    assert whole == pytest.approx(loss, rel=1e-6)
    parts, other = run([slice(0, 3), slice(3, 4), slice(4, 8)])
    assert parts == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(other, gradient, rtol=1e-5, atol=1e-9)


def test_pixels_of_masked_incomplete_patches_change_nothing():
    config = small_config(norm="token")
    model = Maestro(config).initialise(0)
    batch = with_nodata(config, full_batch(config, 4), ("aerial",))
    masks = draw_masks(config, MaskingConfig(), batch)
    counts = hidden_counts(config, [masks])
    pixels = batch.pixels["aerial"].clone()
    patches = pixels.unfold(3, 5, 5).unfold(4, 5, 5).permute(0, 1, 3, 4, 2, 5, 6)  # a view
    uncounted = (masks["aerial"].masked & batch.nodata["aerial"].flatten(1)).view(4, 1, 4, 4)
    assert 0 < uncounted.sum() < masks["aerial"].masked.sum()
    for image, where in zip(patches, uncounted, strict=True):
        image[where] += 1000.0
    changed = dataclasses.replace(batch, pixels={**batch.pixels, "aerial": pixels})
    first, sums = model(batch, masks, counts)
    second, other_sums = model(changed, masks, counts)
    assert torch.equal(first, second)
    assert torch.equal(sums, other_sums)


@pytest.mark.parametrize("names", [("s2",), ("aerial", "s2", "s1_asc", "s1_des")])
def test_a_batch_without_any_complete_patch_has_no_nan(names):
    config = small_config()
    model = Maestro(config).initialise(0)
    batch = with_nodata(config, full_batch(config, 2), names, share=1.1)
    masks = draw_masks(config, MaskingConfig(), batch)
    counts = hidden_counts(config, [masks])
    assert (counts == 0).tolist() == [s.name in names for s in config.sensors]
    loss, sums = model(batch, masks, counts)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (loss.item() == 0) == (len(names) == 4)
    assert model.loss("test", sums, counts).item() == pytest.approx(loss.item())


def test_batches_of_rasters_without_nodata_are_computed_as_before():
    """No token has a mark, so that no operation is added; a sequence is affected only by its own sensors."""
    config = small_config()
    batch = full_batch(config, 2)
    assert all(m.complete is None for m in draw_masks(config, MaskingConfig(), batch).values())
    masks = draw_masks(config, MaskingConfig(), with_nodata(config, batch, ("s1_asc",)))
    assert {name: m.complete is not None for name, m in masks.items()} == {
        "aerial": False,
        "s2": False,
        "s1": True,
    }


def test_a_compiled_step_has_the_same_loss():
    config = small_config()
    batch = with_nodata(config, full_batch(config, 2), ("s1_asc", "aerial"))
    masks = draw_masks(config, MaskingConfig(), batch)
    counts = hidden_counts(config, [masks])
    losses = []
    for compiled in (False, True):
        model = Maestro(config).initialise(0)
        if compiled:
            model.compile_training("step", backend="eager")
        loss, sums = model(batch, masks, counts)
        loss.backward()
        losses.append((loss.item(), sums.tolist()))
    assert losses[0] == losses[1]
