"""The model: the loss is additive over any split, masked tokens do not reach the encoder, costs are counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import TINY, full_batch, small_config
from torch.utils.flop_counter import FlopCounterMode

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import compute_cost, num_parameters
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks, masks_by_sensor
from maestro_scale.model.sequences import sequences
from maestro_scale.model.targets import num_masked_values
from maestro_scale.stream.batch import Batch


def cut(batch: Batch, rows: slice) -> Batch:
    fields = ("pixels", "dates", "noise", "targets")
    parts = {f: {k: v[rows] for k, v in getattr(batch, f).items()} for f in fields}
    return dataclasses.replace(batch, **parts, ref_date=batch.ref_date[rows], keys=batch.keys[rows])


def counts_of(config: ModelConfig, masks) -> torch.Tensor:
    hidden = masks_by_sensor(config, masks)
    return torch.stack([num_masked_values(config, s, hidden[s.name]) for s in config.sensors])


@pytest.mark.parametrize("norm", ["group", "token"])
@pytest.mark.parametrize("fusion", ["group", "shared"])
def test_loss_and_gradients_do_not_depend_on_the_split(fusion, norm):
    config = small_config(fusion=fusion, norm=norm)
    batch = full_batch(config, 12)
    counts = counts_of(config, draw_masks(config, MaskingConfig(), batch))

    def run(cuts: list[slice]) -> tuple[float, torch.Tensor]:
        model = Maestro(config).initialise(0).double()
        total = 0.0
        for rows in cuts:
            part = cut(batch, rows)
            share, _ = model(part, draw_masks(config, MaskingConfig(), part), counts)
            share.backward()
            total += share.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, gradient = run([slice(0, 12)])
    for cuts in ([slice(0, 6), slice(6, 12)], [slice(0, 1), slice(1, 8), slice(8, 12)]):
        loss, other = run(cuts)
        assert loss == pytest.approx(whole, rel=1e-6)
        assert torch.allclose(other, gradient, rtol=1e-5, atol=1e-7)


def test_masked_pixels_do_not_reach_the_encoder_with_token_norm():
    config = small_config(norm="token")
    model, batch = Maestro(config).initialise(0).eval(), full_batch(config, 3)
    masks = draw_masks(config, MaskingConfig(), batch)
    hidden = masks_by_sensor(config, masks)["aerial"]  # (B, 1, 16)
    before = model.encode(batch, masks)
    pixels = batch.pixels["aerial"].clone()
    blocks = pixels.unfold(3, 5, 5).unfold(4, 5, 5)  # a view: (B, 1, C, 4, 4, 5, 5)
    where = hidden.view(3, 1, 1, 4, 4, 1, 1)
    blocks.copy_(torch.where(where, blocks + 100.0, blocks))
    after = model.encode(dataclasses.replace(batch, pixels={**batch.pixels, "aerial": pixels}), masks)
    assert not torch.equal(pixels, batch.pixels["aerial"])
    for name in before:
        assert torch.equal(before[name], after[name])


def test_group_norm_leaks_two_numbers_per_date():
    """Mean and variance over a date: hidden patches may trade places, but not change together."""
    config = small_config(norm="group")
    model, batch = Maestro(config).initialise(0).double().eval(), full_batch(config, 2)
    batch = dataclasses.replace(batch, pixels={k: v.double() for k, v in batch.pixels.items()})
    masks = draw_masks(config, MaskingConfig(), batch)
    hidden = masks_by_sensor(config, masks)["aerial"][:, 0]  # (B, 16)

    def encoded(change) -> dict[str, torch.Tensor]:
        pixels = batch.pixels["aerial"].clone()
        patches = (
            pixels.unfold(3, 5, 5).unfold(4, 5, 5).permute(0, 3, 4, 1, 2, 5, 6)
        )  # a view, B first, then 4 x 4
        for image, where in zip(patches, hidden.view(-1, 4, 4), strict=True):
            image[where] = change(image[where])
        return model.encode(dataclasses.replace(batch, pixels={**batch.pixels, "aerial": pixels}), masks)

    before, traded, changed = encoded(lambda x: x), encoded(lambda x: x.roll(1, 0)), encoded(lambda x: x + 9)
    for name in before:
        assert torch.allclose(before[name], traded[name], atol=1e-6)
    assert not torch.allclose(before["aerial"], changed["aerial"], atol=1e-3)


def test_initialisation_is_complete_and_keyed_by_name():
    config = small_config()
    one, two = Maestro(config), Maestro(config).initialise(3)
    assert all(p.isnan().all() for p in one.parameters())
    assert not any(p.isnan().any() for p in two.parameters())
    again = Maestro(dataclasses.replace(config, sensors=config.sensors[:2])).initialise(3)
    ours = dict(two.named_parameters())
    assert all(torch.equal(p, ours[n]) for n, p in again.named_parameters())


def test_recomputation_gives_the_same_gradient():
    gradients = []
    for checkpointing in ("none", "blocks"):
        config = small_config(checkpointing=checkpointing)
        batch, model = full_batch(config, 4), Maestro(config).initialise(0)
        masks = draw_masks(config, MaskingConfig(), batch)
        model(batch, masks, counts_of(config, masks))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_config_round_trips_through_json():
    import json

    config = small_config()
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_impossible_models_are_refused():
    with pytest.raises(ValueError, match="inter_depth"):
        small_config(fusion="shared", inter_depth=1)
    with pytest.raises(ValueError, match="patch: 3 does not divide"):
        small_config(sensors=(dataclasses.replace(small_config().sensors[0], patch=3),))


@pytest.mark.parametrize("fusion", ["group", "monotemp"])
def test_flops_equal_a_count_of_the_products(fusion):
    config = small_config(fusion=fusion)
    batch, model = full_batch(config, 1), Maestro(config).initialise(0)
    masks = draw_masks(config, MaskingConfig(), batch)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(batch, masks, counts_of(config, masks))
    # torch's counter misses fused attention on a CPU: add 4 * N^2 * heads * dim by hand.
    inner = TINY.heads * TINY.dim_head
    decoder_inner = TINY.decoder_heads * TINY.decoder_dim_head
    lengths = {q.name: (q, masks[q.name]) for q in sequences(config)}
    attention = 0
    for _, mask in lengths.values():
        rows, total = mask.masked.shape
        seen = mask.visible_index.shape[1]
        attention += rows * 4 * seen**2 * inner * (TINY.depth - config.inter_depth)
        # The last block of the decoder mixes for hidden tokens only.
        attention += rows * 4 * total**2 * decoder_inner * (TINY.decoder_depth - 1)
        attention += rows * 4 * total * (total - seen) * decoder_inner
    joined = sum(m.visible_index.numel() for _, m in lengths.values())
    attention += config.inter_depth * 4 * joined**2 * inner
    measured = counter.get_total_flops()
    if "scaled_dot_product" not in str(counter.get_flop_counts()):
        measured += attention
    assert compute_cost(config, 0.75).forward_flops == measured


def test_parameters_are_counted_without_storage():
    config = small_config()
    assert num_parameters(config) == sum(p.numel() for p in Maestro(config).parameters())
