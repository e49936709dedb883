"""Masks: exact counts, structural masks first, random ties, a pure function of each sample's noise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import noise_batch, small_config, small_sensors

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.masking import Mask, MaskingConfig, draw_masks, masks_by_sensor, num_masked
from maestro_scale.model.sequences import num_tokens, sequences
from maestro_scale.stream.batch import Batch, num_noise

HIGH = 0.99  # noise above every probability used here: nothing is masked by it


@pytest.mark.parametrize("spectral", ["joint", "token"])
@pytest.mark.parametrize("fusion", ["group", "mod", "monotemp", "shared"])
def test_every_row_masks_exactly_its_quota(fusion, spectral):
    config = small_config(fusion=fusion, spectral=spectral)
    masks = draw_masks(config, MaskingConfig(band_group=0.2), noise_batch(config, 64))
    for q in sequences(config):
        tokens = num_tokens(config, q)
        mask = masks[q.name]
        assert (mask.masked.sum(1) == num_masked(0.75, tokens)).all()
        assert mask.visible_index.shape[1] == tokens - num_masked(0.75, tokens)
        assert not mask.masked.gather(1, mask.visible_index).any()


def test_a_mask_depends_on_its_own_sample_only():
    config = small_config()
    batch = noise_batch(config, 8)
    whole = draw_masks(config, MaskingConfig(), batch)
    for i in range(8):
        one = dataclasses.replace(batch, noise={k: v[i : i + 1] for k, v in batch.noise.items()}, keys=("k",))
        alone = draw_masks(config, MaskingConfig(), one)
        for name, mask in alone.items():
            assert torch.equal(mask.masked[0], whole[name].masked[i])


def test_structurally_masked_tokens_come_first():
    config = small_config()
    batch = noise_batch(config, 512)
    dates_only = MaskingConfig(ratio=0.75, modality=0.0, date=0.3, location=0.0)
    hidden = masks_by_sensor(config, draw_masks(config, dates_only, batch))["s2"]
    fully_hidden = hidden.all(dim=2).float().mean()
    # 0.3 of the dates, unless more than the quota of them fell (never drawn back below the quota).
    assert 0.25 < fully_hidden < 0.36


def test_ties_leave_a_random_subset_visible():
    config = small_config()
    everything = MaskingConfig(ratio=0.5, modality=0.0, date=0.0, location=0.97)
    hidden = masks_by_sensor(config, draw_masks(config, everything, noise_batch(config, 2048)))["aerial"]
    share = hidden.float().mean(0).flatten()
    assert (share - 0.5).abs().max() < 0.06, "positions are hidden unequally often: ties are not at random"


def test_without_structure_every_token_is_equally_likely():
    config = small_config()
    free = MaskingConfig(modality=0.0, date=0.0, location=0.0)
    for hidden in masks_by_sensor(config, draw_masks(config, free, noise_batch(config, 4096))).values():
        assert (hidden.float().mean(0) - hidden.float().mean()).abs().max() < 0.04


def test_modality_masks_only_where_a_group_is_shared():
    config = small_config()
    hidden = masks_by_sensor(
        config, draw_masks(config, MaskingConfig(modality=0.9, date=0, location=0), noise_batch(config, 256))
    )
    whole = {k: v.flatten(1).all(1).float().mean().item() for k, v in hidden.items()}
    assert whole["s1_asc"] > 0.3
    assert whole["s1_des"] > 0.3
    assert whole["aerial"] == whole["s2"] == 0.0


def test_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="same number of tokens"):
        Mask.of(torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize(
    ("ratio", "tokens", "expected"),
    [
        (0.75, 12, 9),
        (0.7, 11, 8),  # 7.7
        (0.6, 36, 22),  # 21.6
        (0.6, 4, 2),  # 2.4
        (0.75, 6, 4),  # 4.5: half to even
        (0.75, 10, 8),  # 7.5: half to even
        (0.99, 4, 3),  # 3.96 would hide all four
        (1.0, 16, 15),
        (0.0, 16, 0),
    ],
)
def test_the_number_of_masked_tokens_is_rounded_and_leaves_one_visible(ratio, tokens, expected):
    assert num_masked(ratio, tokens) == expected


def test_masks_have_the_rounded_number_of_tokens():
    config = small_config()
    masks = draw_masks(config, MaskingConfig(ratio=0.6), noise_batch(config, 2))
    # aerial: 4 * 4 tokens, 9.6 -> 10. s2: 4 dates * 3 * 3, 21.6 -> 22. s1: two sensors of 2 dates * 3 * 3, the same.
    hidden = {name: mask.masked.sum(1).tolist() for name, mask in masks.items()}
    assert hidden == {"aerial": [10, 10], "s2": [22, 22], "s1": [22, 22]}


def noise_of(
    sensor: Sensor, tokens: list[float], candidates: list[dict[str, list[float]]] | None = None
) -> torch.Tensor:
    """(num_noise,) noise of one sample: of each token; then per candidate "modality", "date", "location", "group".

    What a candidate leaves out masks nothing; candidates left out are like the last one.
    """
    lengths = {"modality": 1, "date": sensor.num_dates, "location": sensor.grid**2}
    lengths["group"] = sensor.max_token_groups
    unused = sensor.num_dates * sensor.grid**2 * sensor.max_token_groups - len(tokens)
    given = candidates or [{}]
    values = [*tokens, *[HIGH] * unused]
    for number in range(8):
        candidate = given[min(number, len(given) - 1)]
        for part, length in lengths.items():
            values += candidate.get(part, [HIGH] * length)
    assert len(values) == num_noise(sensor)
    return torch.tensor(values)


def masked_by(config: ModelConfig, masking: MaskingConfig, noise: dict[str, torch.Tensor]) -> dict[str, list]:
    """{sensor: hidden (R, L) as 0 and 1} of one sample."""
    batch: Batch = dataclasses.replace(
        noise_batch(config, 1), noise={name: values[None] for name, values in noise.items()}
    )
    found = masks_by_sensor(config, draw_masks(config, masking, batch))
    return {name: hidden[0].int().tolist() for name, hidden in found.items()}


def tiny_sensor(template: Sensor, **changes) -> Sensor:
    """Four tokens per date: 2 x 2 patches of 2 pixels."""
    return dataclasses.replace(template, image_size=4, patch=2, **changes)


def test_the_tokens_of_the_highest_noise_are_masked():
    sensor = tiny_sensor(small_sensors()[2], num_dates=1)
    config = small_config(sensors=(sensor,))
    noise = {sensor.name: noise_of(sensor, [0.4, 0.9, 0.1, 0.8])}
    assert masked_by(config, MaskingConfig(ratio=0.5), noise) == {sensor.name: [[0, 1, 0, 1]]}


def test_the_date_mask_excludes_sensors_of_one_date():
    one, two = (
        tiny_sensor(sensor, num_dates=dates)
        for sensor, dates in zip(small_sensors()[2:], (1, 2), strict=True)
    )
    config = small_config(sensors=(one, two))
    # The date of ``one`` draws 0.0, below the probability; 4 of the 12 tokens are hidden. If it were masked, its four
    # would be hidden first; as it is the only date, the noise decides, and that of ``two`` is higher.
    noise = {
        one.name: noise_of(one, [0.1] * 4, [{"date": [0.0]}]),
        two.name: noise_of(two, [0.2, 0.9, 0.3, 0.8, 0.7, 0.4, 0.6, 0.5]),
    }
    masking = MaskingConfig(ratio=1 / 3, modality=0.0, date=0.5, location=0.0)
    assert masked_by(config, masking, noise) == {
        one.name: [[0, 0, 0, 0]],
        two.name: [[0, 1, 0, 1], [1, 0, 1, 0]],
    }
    # The second date of ``two`` may be masked: its four tokens are hidden, whatever their noise.
    noise[two.name] = noise_of(two, [0.9] * 4 + [0.2] * 4, [{"date": [HIGH, 0.0]}])
    assert masked_by(config, masking, noise)[two.name] == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_noise_equal_to_a_probability_masks_nothing():
    sensor = tiny_sensor(small_sensors()[2], num_dates=2)
    config = small_config(sensors=(sensor,))
    masking = MaskingConfig(ratio=0.5, modality=0.0, date=0.25, location=0.25)
    tokens = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]  # the first date's are higher
    at = noise_of(sensor, tokens, [{"date": [HIGH, 0.25], "location": [HIGH, HIGH, HIGH, 0.25]}])
    below = noise_of(sensor, tokens, [{"date": [HIGH, 0.2499]}])
    assert masked_by(config, masking, {sensor.name: at}) == {sensor.name: [[1, 1, 1, 1], [0, 0, 0, 0]]}
    assert masked_by(config, masking, {sensor.name: below}) == {sensor.name: [[0, 0, 0, 0], [1, 1, 1, 1]]}


def test_the_band_group_mask_excludes_sensors_of_one_group():
    grouped = tiny_sensor(small_sensors()[2], num_dates=1)
    masking = MaskingConfig(ratio=0.5, modality=0.0, date=0.0, location=0.0, band_group=0.5)
    drawn = [{"group": [0.0, HIGH]}]
    # Two tokens per patch: those of the first group are masked, though the second group's noise is higher.
    config = small_config(sensors=(grouped,), spectral="token")
    noise = {grouped.name: noise_of(grouped, [0.1] * 4 + [0.9] * 4, drawn)}
    assert masked_by(config, masking, noise) == {grouped.name: [[1, 1, 1, 1], [0, 0, 0, 0]]}
    # One token per patch, beside another sensor: there is only one group, so nothing is masked.
    other = tiny_sensor(small_sensors()[3], num_dates=1)
    config = small_config(sensors=(grouped, other))
    noise = {grouped.name: noise_of(grouped, [0.1] * 4, drawn), other.name: noise_of(other, [0.9] * 4)}
    assert masked_by(config, masking, noise) == {grouped.name: [[0] * 4], other.name: [[1] * 4]}


def test_the_modality_mask_excludes_sensors_alone_in_their_group():
    asc, des = (tiny_sensor(sensor, num_dates=1) for sensor in small_sensors()[2:])
    masking = MaskingConfig(ratio=0.5, modality=0.5, date=0.0, location=0.0)
    drawn = [{"modality": [0.0]}]
    config = small_config(sensors=(asc, des))
    noise = {asc.name: noise_of(asc, [0.1] * 4, drawn), des.name: noise_of(des, [0.9] * 4)}
    assert masked_by(config, masking, noise) == {asc.name: [[1] * 4], des.name: [[0] * 4]}
    # In a sequence of its own it would be masked whole, and the location mask with it. It is not:
    masking = dataclasses.replace(masking, ratio=0.25, location=0.5)
    config = small_config(sensors=(asc,))
    candidate = {"modality": [0.0], "location": [HIGH, HIGH, 0.0, HIGH]}
    noise = {asc.name: noise_of(asc, [0.9, 0.5, 0.1, 0.5], [candidate])}
    assert masked_by(config, masking, noise) == {asc.name: [[0, 0, 1, 0]]}


def test_a_structure_that_masks_everything_is_replaced_by_the_next_candidate_or_none():
    sensor = tiny_sensor(small_sensors()[2], num_dates=2)
    config = small_config(sensors=(sensor,))
    masking = MaskingConfig(ratio=0.5, modality=0.0, date=0.5, location=0.0)
    tokens = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    whole, second, first = ({"date": dates} for dates in ([0.0, 0.0], [HIGH, 0.0], [0.0, HIGH]))
    for candidates, hidden in (
        ([whole, second, first], [[0] * 4, [1] * 4]),
        ([whole] * 7 + [second], [[0] * 4, [1] * 4]),
        ([second, first], [[0] * 4, [1] * 4]),
        ([whole], [[1] * 4, [0] * 4]),  # no structure: the higher noise
    ):
        noise = {sensor.name: noise_of(sensor, tokens, candidates)}
        assert masked_by(config, masking, noise) == {sensor.name: hidden}


@pytest.mark.parametrize(
    ("masking", "share"), [(MaskingConfig(0.75, 0, 0, 0, 0), 0.0179), (MaskingConfig(), 0.118)]
)
def test_a_place_is_rarely_hidden_on_all_dates_without_structural_masks(masking, share):
    # Each of 16 dates hides 7 of 9 tokens, as its own sequence: (7 / 9) ** 16 = 0.0179. With structural masks, 11.8 %.
    sensor = dataclasses.replace(small_sensors()[1], num_dates=16)
    config = small_config(sensors=(sensor,), fusion="monotemp")
    hidden = masks_by_sensor(config, draw_masks(config, masking, noise_batch(config, 4000)))["s2"]
    assert (hidden.sum(2) == 7).all()
    assert hidden.all(1).float().mean().item() == pytest.approx(share, abs=0.006 if share > 0.1 else 0.003)


def test_the_default_probabilities():
    # As in the authors' configuration.
    assert MaskingConfig() == MaskingConfig(
        ratio=0.75, modality=0.25, date=0.25, location=0.25, band_group=0.0
    )


def test_indices_of_a_mask_ascend():
    mask = Mask.of(torch.tensor([[True, False, True, False, False], [False, False, True, True, False]]))
    assert mask.visible_index.tolist() == [[1, 3, 4], [0, 1, 4]]
    assert mask.masked_index.tolist() == [[0, 2], [2, 3]]
    single = Mask.of(torch.tensor([[False, True, True]]))
    assert (single.visible_index.tolist(), single.masked_index.tolist()) == ([[0]], [[1, 2]])


def test_the_mask_of_the_second_band_group_hides_its_own_tokens():
    sensor = tiny_sensor(small_sensors()[2], num_dates=1)
    masking = MaskingConfig(ratio=0.5, modality=0.0, date=0.0, location=0.0, band_group=0.5)
    config = small_config(sensors=(sensor,), spectral="token")
    noise = {sensor.name: noise_of(sensor, [0.9] * 4 + [0.1] * 4, [{"group": [HIGH, 0.0]}])}
    assert masked_by(config, masking, noise) == {sensor.name: [[0, 0, 0, 0], [1, 1, 1, 1]]}


def test_padding_counts_as_masked_where_a_candidate_masks_a_whole_sequence():
    # Three sequences of 1, 4 and 8 tokens. The first candidate masks all four tokens of the second sequence, so the
    # next is used, which masks its third token alone. Padding that was not masked would make the first one acceptable.
    aerial, s2, s1 = small_sensors()[:3]
    one = dataclasses.replace(aerial, image_size=aerial.patch)
    four, eight = tiny_sensor(s2, num_dates=1), tiny_sensor(s1, num_dates=2)
    config = small_config(sensors=(one, four, eight))
    candidates = [{"location": [0.0] * 4}, {"location": [HIGH, HIGH, 0.0, HIGH]}]
    noise = {
        one.name: noise_of(one, [0.5]),
        four.name: noise_of(four, [0.9, 0.8, 0.1, 0.7], candidates),
        eight.name: noise_of(eight, [0.5] * 8),
    }
    masking = MaskingConfig(ratio=0.25, modality=0.0, date=0.0, location=0.5)
    assert masked_by(config, masking, noise)[four.name] == [[0, 0, 1, 0]]
