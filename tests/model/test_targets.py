"""What the decoder predicts and its loss, in numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import small_config, small_sensors

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.sequences import pack, sequences
from maestro_scale.model.targets import (
    combine_losses,
    denormalise,
    error_sum,
    masked_bands,
    masked_counts,
    masked_token_errors,
    normalise,
    num_masked_values,
)

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


@pytest.mark.parametrize(("loss", "expected", "zero"), [("l1", 8.0, 10.0), ("l2", 20.0, 22.0)])
def test_the_error_is_summed_over_masked_patches_only(loss, expected, zero):
    # Two patches; the second is visible. Errors of the hidden one: 1, 1, 1, 1 in band 1 and 0, 0, 0, 4 in band 2. Those
    # of predicting zero are its values: 1, 3, 0, 0 and 0, 2, 2, 2. The squares of the latter add up to 10 + 12.
    config = config_of(target="none", loss=loss)
    values = patch([1.0, -3.0, 0.0, 0.0], [0.0, 2.0, 2.0, -2.0])
    truth = torch.cat([values, patch([5.0] * 4)], dim=2)
    answer = torch.cat(
        [values + patch([1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 4.0]), patch([9.0] * 4)], dim=2
    )
    hidden = torch.tensor([[[True, False]]])
    assert torch.stack(error_sum(config, SENSOR, answer, truth, hidden)).tolist() == [expected, zero]


def test_errors_of_half_precision_are_summed_in_single():
    # 3,000 errors of 1 in bfloat16 would stop adding up at 256.
    values = torch.zeros(1, 1, 375, 4, 2, dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, 375, dtype=torch.bool)
    total, _ = error_sum(config_of(target="none"), SENSOR, values + 1, values, hidden)
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


# Five bands in groups of 2, 2 and 1.
GROUPED = dataclasses.replace(SENSOR, bands=(0, 1, 2, 3, 4), band_groups=(2, 2, 1), token_groups=(2, 2, 1))


def test_groups_of_different_sizes_are_normalised_apart_and_stay_in_order():
    # (2 patches, 4 pixels, 5 bands). The first patch: groups around 1 and 12 with deviations of 1 and 2, and a constant
    # band. The second: 0 in the first group, 7 in the second, deviations of 1 in the last.
    first = torch.tensor([[0.0, 2.0, 10.0, 14.0, 5.0]] * 4, dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0, 7.0, 7.0, x] for x in (1.0, 1.0, 3.0, 3.0)], dtype=torch.float64)
    patches = torch.stack([first, second])
    # 1 / sqrt(8 / 7) = 0.935414; 2 / sqrt(32 / 7) is the same; 1 / sqrt(4 / 3) = 0.866025.
    a, b = 0.935414, 0.866025
    expected = torch.tensor([[[-a, a, -a, a, 0.0]] * 4, [[0.0] * 4 + [x] for x in (-b, -b, b, b)]]).double()
    config = config_of(sensors=(GROUPED,))
    torch.testing.assert_close(normalise(config, GROUPED, patches), expected, rtol=0, atol=1e-5)
    series = patches[None, None]  # (B, D, L, P*P, C)
    back = denormalise(config, GROUPED, normalise(config, GROUPED, series), series)
    torch.testing.assert_close(back, series, rtol=0, atol=1e-9)


def test_bands_are_masked_by_group_date_and_patch():
    # Two tiles, two dates, four patches, a token for each of the groups of 2, 2 and 1 bands: rows are group-major.
    sensor = dataclasses.replace(GROUPED, num_dates=2)
    config = config_of(sensors=(sensor,), spectral="token")
    masked = torch.zeros(2, 6, 4, dtype=torch.bool)
    masked[0, 1, 2] = True  # first group, second date
    masked[1, 4, 3] = True  # third group, first date
    bands = masked_bands(config, sensor, masked)
    assert bands.shape == (2, 2, 4, 1, 5)
    assert bands.nonzero().tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 0, 1], [1, 0, 3, 0, 4]]
    # Of 3 x 3 pixels each: 9 * 2 and 9 * 1.
    assert num_masked_values(config, dataclasses.replace(sensor, patch=3, image_size=6), masked).item() == 27


def test_the_error_is_that_of_the_prediction_minus_the_target():
    truth, prediction = patch([3.0] * 4, [1.0] * 4), patch([5.0] * 4, [0.0] * 4)
    total, _ = error_sum(config_of(target="none"), SENSOR, prediction, truth, torch.tensor([[[True]]]))
    assert total.item() == 4 * 2 + 4 * 1


def test_errors_of_masked_tokens_are_summed_by_sensor():
    # Two rows of three masked tokens; the prediction of sensor 0 is off by k in each of the 8 values of token k,
    # that of sensor 1 by 10 k.
    patches = torch.arange(2 * 3 * 4 * 2, dtype=torch.float32).view(2, 3, 4, 2)
    number = torch.arange(1.0, 7.0).view(2, 3, 1, 1)
    first, second = ((patches - step * number).flatten(2) for step in (1, 10))
    of_sensor = torch.tensor([[[1, 0], [0, 1], [0, 1]], [[1, 0], [1, 0], [0, 1]]])
    config = config_of(target="none")
    sums, zero = masked_token_errors(config, SENSOR, [first, second], patches, of_sensor)
    assert sums.tolist() == [8 * (1 + 4 + 5), 80 * (2 + 3 + 6)]
    # The values of token k are 8 k … 8 k + 7: they add up to 64 k + 28.
    assert zero.tolist() == [64 * (0 + 3 + 4) + 3 * 28, 64 * (1 + 2 + 5) + 3 * 28]
    squared = config_of(target="none", loss="l2")
    sums, _ = masked_token_errors(squared, SENSOR, [first, second], patches, of_sensor)
    assert sums.tolist() == [8 * (1 + 16 + 25), 800 * (4 + 9 + 36)]
    sums, zero = masked_token_errors(config, SENSOR, [first], patches, None)
    assert (sums.tolist(), zero.tolist()) == ([8 * 21], [47 * 48 / 2])
    # Targets are normalised by token: of band values -1, -1, 1, 1 to -0.866025 and 0.866025.
    values = torch.tensor([-1.0, -1.0, 1.0, 1.0])[None, None, :, None].repeat(2, 3, 1, 2) * number
    for error in masked_token_errors(config_of(), SENSOR, [torch.zeros(2, 3, 8)], values, None):
        assert error.item() == pytest.approx(6 * 8 * 0.866025, rel=1e-4)


@pytest.mark.parametrize("fusion", ["group", "mod", "monotemp"])
def test_masked_values_of_all_sequences_are_counted_by_sensor(fusion):
    # Values of a token: aerial 5 * 5 pixels of 4 bands, s2 2 * 2 of 10, s1 2 * 2 of 2. Masked tokens of two tiles:
    # aerial 3 and 1, s2 5 and 0, s1_asc 1 and 1, s1_des 0 and 3.
    config = small_config(fusion=fusion)
    by_sensor = {s.name: torch.zeros(2, config.rows(s), s.grid**2, dtype=torch.bool) for s in config.sensors}
    by_sensor["aerial"][0, 0, :3] = by_sensor["aerial"][1, 0, 15] = True
    by_sensor["s2"][0, 3, 4:] = True
    by_sensor["s1_asc"][:, 1, 8] = True
    by_sensor["s1_des"][1, 0, :3] = True
    masks = [pack(q, by_sensor) for q in sequences(config)]
    counts = masked_counts(config, masks)
    assert (counts.tolist(), counts.dtype) == ([4 * 100, 5 * 40, 2 * 8, 3 * 8], torch.float64)


def test_masked_values_of_tokens_of_band_groups():
    # aerial has tokens of 1 and of 3 bands, of 25 pixels.
    config = small_config(sensors=small_sensors()[:1], spectral="token")
    masked = torch.zeros(1, 32, dtype=torch.bool)
    masked[0, [0, 15, 16]] = True
    assert masked_counts(config, [masked]).tolist() == [2 * 25 + 75]


def test_a_sensor_with_one_masked_value_counts():
    config = small_config()
    sums, counts = torch.tensor([3.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0]).double()
    assert combine_losses(config, sums, counts).item() == pytest.approx(16 * 3 / 88, rel=1e-6)
