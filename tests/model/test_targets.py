"""What the decoder predicts and its loss, in numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import small_config, small_sensors

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.targets import combine_losses, denormalise, error_sum, normalise, num_masked_values

# Two bands in groups of their own, patches of 2 x 2 pixels, 2 x 2 patches.
SENSOR = dataclasses.replace(small_sensors()[2], image_size=4, patch=2, num_dates=1)


def config_of(**changes) -> ModelConfig:
    return small_config(**{"sensors": (SENSOR,), **changes})


def patch(first: list[float], second: list[float] = (0.0,) * 4) -> torch.Tensor:
    """(1, 1, 1, 4, 2): one patch, four pixels of two bands, in double precision."""
    return torch.tensor([first, second], dtype=torch.float64).T[None, None, None]


def test_the_variance_is_unbiased_and_its_floor_is_a_millionth():
    # Band 1: mean 0.001, deviations 0.001, variance 4e-6 / 3. 0.001 / sqrt(4e-6 / 3 + 1e-6) = sqrt(3 / 7) = 0.654654.
    # Band 2 is constant: 0 / sqrt(1e-6).
    values = patch([0.0, 0.0, 0.002, 0.002], [5.0] * 4)
    found = normalise(config_of(), SENSOR, values)
    expected = patch([-0.654654, -0.654654, 0.654654, 0.654654])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(denormalise(config_of(), SENSOR, expected, values), values, rtol=0, atol=1e-8)


def test_bands_are_normalised_together_or_not_at_all_where_the_target_says_so():
    values = patch([0.0] * 4, [2.0] * 4)
    # Together: mean 1, deviations 1, variance 8 / 7; 1 / sqrt(8 / 7) = 0.935414.
    whole = patch([-0.935414] * 4, [0.935414] * 4)
    torch.testing.assert_close(normalise(config_of(target="patch"), SENSOR, values), whole, rtol=0, atol=1e-6)
    assert torch.equal(normalise(config_of(target="none"), SENSOR, values), values)
    assert torch.equal(normalise(config_of(target="patch_group"), SENSOR, values), torch.zeros_like(values))


@pytest.mark.parametrize(("loss", "expected"), [("l1", 8.0), ("l2", 20.0)])
def test_the_error_is_summed_over_masked_patches_only(loss, expected):
    # Two patches; the second is visible. Errors of the hidden one: 1, 1, 1, 1 in band 1 and 0, 0, 0, 4 in band 2.
    config = config_of(target="none", loss=loss)
    truth = torch.cat([patch([0.0] * 4), patch([0.0] * 4)], dim=2)
    answer = torch.cat([patch([1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 4.0]), patch([9.0] * 4)], dim=2)
    hidden = torch.tensor([[[True, False]]])
    assert error_sum(config, SENSOR, answer, truth, hidden).item() == expected


def test_errors_of_half_precision_are_summed_in_single():
    # 3,000 errors of 1 in bfloat16 would stop adding up at 256.
    values = torch.zeros(1, 1, 375, 4, 2, dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, 375, dtype=torch.bool)
    total = error_sum(config_of(target="none"), SENSOR, values + 1, values, hidden)
    assert (total.item(), total.dtype) == (3000.0, torch.float32)


def test_num_masked_values_are_counted_by_bands_of_the_group_and_pixels_of_the_patch():
    # 3 hidden tokens of all 2 bands and 2 * 2 pixels each.
    hidden = torch.tensor([[[True, True, False, True]]])
    assert num_masked_values(config_of(), SENSOR, hidden).item() == 3 * 2 * 4
    # With a token per group: one of 1 band and one of 3, four pixels each.
    aerial = dataclasses.replace(small_sensors()[0], image_size=4, patch=2)
    config = config_of(sensors=(aerial,), spectral="token")
    first, second = torch.zeros(2, 1, 2, 4, dtype=torch.bool)
    first[0, 0, 1], second[0, 1, 2] = True, True
    assert num_masked_values(config, aerial, first).item() == 1 * 4
    assert num_masked_values(config, aerial, second).item() == 3 * 4


def test_the_loss_weights_each_sensors_mean_by_its_tokens():
    # aerial: 4 * 4 = 16 tokens; s2: 4 dates * 3 * 3 = 36; s1_asc and s1_des: 2 * 9 = 18 each. 88 in all.
    config = small_config()
    sums = torch.tensor([20.0, 30.0, 8.0, 2.0])
    counts = torch.tensor([10.0, 10.0, 4.0, 4.0], dtype=torch.float64)
    # Means 2, 3, 2, 0.5: (16 * 2 + 36 * 3 + 18 * 2 + 18 * 0.5) / 88 = 185 / 88.
    assert combine_losses(config, sums, counts).item() == pytest.approx(185 / 88, rel=1e-6)
    # Nothing of s2 is hidden: (16 * 2 + 18 * 2 + 18 * 0.5) / 52 = 77 / 52.
    sums[1], counts[1] = 0.0, 0.0
    assert combine_losses(config, sums, counts).item() == pytest.approx(77 / 52, rel=1e-6)
