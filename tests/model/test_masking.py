"""Masks: exact counts, structure first, ties at random, a pure function of each sample's noise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import noise_batch, small_config

from maestro_scale.model.masking import Mask, Masking, by_sensor, draw_masks, num_hidden
from maestro_scale.model.sequences import num_tokens, sequences


@pytest.mark.parametrize("spectral", ["joint", "token"])
@pytest.mark.parametrize("fusion", ["group", "mod", "monotemp", "shared"])
def test_every_row_hides_exactly_its_quota(fusion, spectral):
    config = small_config(fusion=fusion, spectral=spectral)
    masks = draw_masks(config, Masking(band_group=0.2), noise_batch(config, 64))
    for q in sequences(config):
        tokens = num_tokens(config, q)
        mask = masks[q.name]
        assert (mask.hidden.sum(1) == num_hidden(0.75, tokens)).all()
        assert mask.visible.shape[1] == tokens - num_hidden(0.75, tokens)
        assert not mask.hidden.gather(1, mask.visible).any()


def test_a_mask_depends_on_its_own_sample_only():
    config = small_config()
    batch = noise_batch(config, 8)
    whole = draw_masks(config, Masking(), batch)
    for i in range(8):
        one = dataclasses.replace(batch, noise={k: v[i : i + 1] for k, v in batch.noise.items()}, keys=("k",))
        alone = draw_masks(config, Masking(), one)
        for name, mask in alone.items():
            assert torch.equal(mask.hidden[0], whole[name].hidden[i])


def test_structural_masks_are_hidden_first():
    config = small_config()
    batch = noise_batch(config, 512)
    dates_only = Masking(ratio=0.75, modality=0.0, date=0.3, location=0.0)
    hidden = by_sensor(config, draw_masks(config, dates_only, batch))["s2"]
    fully_hidden = hidden.all(dim=2).float().mean()
    # 0.3 of the dates, unless more than the quota of them fell (never drawn back below the quota).
    assert 0.25 < fully_hidden < 0.36


def test_ties_leave_a_random_subset_visible():
    config = small_config()
    everything = Masking(ratio=0.5, modality=0.0, date=0.0, location=0.97)
    hidden = by_sensor(config, draw_masks(config, everything, noise_batch(config, 2048)))["aerial"]
    share = hidden.float().mean(0).flatten()
    assert (share - 0.5).abs().max() < 0.06, "positions are hidden unequally often: ties are not at random"


def test_without_structure_every_token_is_equally_likely():
    config = small_config()
    free = Masking(modality=0.0, date=0.0, location=0.0)
    for hidden in by_sensor(config, draw_masks(config, free, noise_batch(config, 4096))).values():
        assert (hidden.float().mean(0) - hidden.float().mean()).abs().max() < 0.04


def test_modality_masks_only_where_a_group_is_shared():
    config = small_config()
    hidden = by_sensor(
        config, draw_masks(config, Masking(modality=0.9, date=0, location=0), noise_batch(config, 256))
    )
    whole = {k: v.flatten(1).all(1).float().mean().item() for k, v in hidden.items()}
    assert whole["s1_asc"] > 0.3
    assert whole["s1_des"] > 0.3
    assert whole["aerial"] == whole["s2"] == 0.0


def test_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="same number of tokens"):
        Mask.of(torch.tensor([[True, False], [False, False]]))
