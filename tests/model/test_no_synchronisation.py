"""Masks, forward and backward never read a tensor's value on the host (invariant 11 of docs/architecture.md).

Meta tensors have shapes but no values: ``.item()``, ``bool()``, boolean indexing and copies to the host all raise.
"""

from __future__ import annotations

import pytest
import torch
from testkit.models import full_batch, small_config

from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks
from maestro_scale.training.objectives import hidden_counts


@pytest.mark.parametrize("fusion", ["group", "mod", "monotemp", "shared"])
@pytest.mark.parametrize("spectral", ["joint", "token"])
def test_a_step_runs_without_the_values_of_any_tensor(fusion, spectral):
    config = small_config(fusion=fusion, spectral=spectral)
    with torch.device("meta"):
        model = Maestro(config)
    batch = full_batch(config, 3).to("meta")
    masks = draw_masks(config, MaskingConfig(band_group=0.25), batch)
    loss, sums = model(batch, masks, hidden_counts(config, [masks]))
    loss.backward()
    assert loss.is_meta
    assert sums.shape == (2 * len(config.sensors),)
    assert all(p.grad is not None for p in model.parameters())


def test_reading_a_value_raises():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(1, device="meta").item()
