"""Parity with the reference model: every fixture in MAESTRO_PARITY_DIR, within 1e-4 relative.

A fixture is NAME.json (configuration, losses) beside NAME.safetensors (weights, batch, masks, outputs). Nothing here
is tuned to the fixtures at hand: fusion, band groups, targets and datasets are read from the JSON.
"""

from __future__ import annotations

import pytest
import torch
from testkit.parity import FIXTURES, LOSSES, PARITY_DIR, RELATIVE, batch_of, build, close, load

from maestro_scale.model.embed import unpatchify
from maestro_scale.model.masking import Mask, masks_by_sensor
from maestro_scale.model.targets import num_masked_values


def test_fixtures_are_found():
    if not PARITY_DIR.is_dir():
        pytest.skip(f"no parity fixtures at {PARITY_DIR}; set MAESTRO_PARITY_DIR")
    assert FIXTURES, f"{PARITY_DIR} holds no fixture"


@pytest.mark.parametrize("name", FIXTURES)
def test_reconstruction(name):
    fixture = load(name)
    model, batch = build(fixture), batch_of(fixture)
    masks = {k: Mask.of(v) for k, v in fixture.under("mask").items()}
    with torch.no_grad():
        patches = model.reconstruct(batch, masks)
    for s in fixture.config.sensors:
        close(unpatchify(patches[s.name], s.patch), fixture.tensors[f"pixels/{s.name}"])


@pytest.mark.parametrize("name", FIXTURES)
def test_logits(name):
    fixture = load(name)
    with torch.no_grad():
        logits = build(fixture).head_outputs(batch_of(fixture))
    for target, theirs in fixture.under("logits").items():
        close(logits[target], theirs.reshape(logits[target].shape))


@pytest.mark.parametrize(("name", "which"), [(n, w) for n in FIXTURES for w in load(n).losses])
def test_loss(name, which):
    fixture = load(name)
    model = build(fixture, *LOSSES[which])
    masks = {k: Mask.of(v) for k, v in fixture.under("mask").items()}
    hidden = masks_by_sensor(model.config, masks)
    counts = torch.stack([num_masked_values(model.config, s, hidden[s.name]) for s in fixture.config.sensors])
    with torch.no_grad():
        loss, _ = model(batch_of(fixture), masks, counts)
    assert loss.item() == pytest.approx(fixture.losses[which], rel=RELATIVE)
