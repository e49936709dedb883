"""Initialisation from a model of another dataset: matching weights are loaded, and a table lists the others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from testkit.models import small_config, small_sensors

from maestro_scale.interop.export import ExportError, write_model
from maestro_scale.interop.partial import start_from
from maestro_scale.interop.transfer import transfer_table
from maestro_scale.model.maestro import Maestro


def save(tmp_path, **changes) -> Maestro:
    model = Maestro(small_config(**changes)).initialise(1)
    write_model(tmp_path / "start", model.state_dict(), model.config, {})
    return model


def statuses(parts) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for part in parts:
        found.setdefault(part.name, set()).add(part.status)
    return found


def test_the_same_model_is_loaded_completely(tmp_path):
    start = save(tmp_path)
    model = Maestro(small_config()).initialise(2)
    parts = start_from(model, str(tmp_path / "start"))
    assert {p.status for p in parts} == {"loaded"}
    assert sum(p.num_values for p in parts) == sum(p.numel() for p in model.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, start.state_dict()[name])


def test_other_sensors_are_initialised_or_unused(tmp_path):
    aerial, s2, *s1 = small_sensors()
    start = save(tmp_path, sensors=(aerial, s2))
    model = Maestro(small_config(sensors=(s2, *s1))).initialise(2)
    drawn = {n: p.clone() for n, p in model.named_parameters()}
    found = statuses(start_from(model, str(tmp_path / "start")))
    assert found["encoders.s2"] == found["patch_embed.s2"] == found["inter"] == {"loaded"}
    assert found["encoders.s1"] == found["patch_embed.s1_asc"] == {"initialised"}
    assert found["encoders.aerial"] == {"unused"}
    for name, p in model.named_parameters():
        expected = start.state_dict() if name in start.state_dict() else drawn
        assert torch.equal(p, expected[name]), name


def test_a_shared_embedding_provides_its_mask_token(tmp_path):
    aerial, s2, asc, des = small_sensors()
    s1 = dataclasses.replace(asc, name="s1", source="s1", embed="s1")
    start = save(tmp_path, sensors=(aerial, s2, s1))
    shared = tuple(dataclasses.replace(s, embed="s1") for s in (asc, des))
    model = Maestro(small_config(sensors=(aerial, s2, *shared))).initialise(2)
    parts = start_from(model, str(tmp_path / "start"))
    assert {p.status for p in parts} == {"loaded"}
    for name in ("s1_asc", "s1_des"):
        assert torch.equal(model.mask_token[name].vectors, start.mask_token["s1"].vectors)


def test_another_patch_size_is_resized_to_agree(tmp_path):
    aerial = small_sensors()[0]  # patches of 5 pixels
    start = save(tmp_path, sensors=(aerial,))
    finer = dataclasses.replace(aerial, image_size=40, patch=10)
    model = Maestro(small_config(sensors=(finer,))).initialise(2)
    parts = start_from(model, str(tmp_path / "start"))
    found = statuses(parts)
    assert "resized" in found["patch_embed.aerial"]
    assert found["to_pixels.aerial"] == {"resized"}
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(7, 4, 5, 5, generator=generator)
    larger = F.interpolate(image, size=(10, 10), mode="bilinear")
    ours, theirs = model.patch_embed["aerial"][0].proj, start.patch_embed["aerial"][0].proj
    assert torch.allclose(ours(larger.flatten(1)), theirs(image.flatten(1)), atol=1e-5)
    tokens = torch.rand(7, 24, generator=generator)
    small = start.to_pixels["aerial"][0](tokens).view(7, 5, 5, 4).permute(0, 3, 1, 2)
    large = model.to_pixels["aerial"][0](tokens).view(7, 10, 10, 4).permute(0, 3, 1, 2)
    assert torch.allclose(large, F.interpolate(small, size=(10, 10), mode="bilinear"), atol=1e-5)


def test_the_table_names_every_part(tmp_path):
    aerial, s2, *_ = small_sensors()
    save(tmp_path, sensors=(aerial,))
    model = Maestro(small_config(sensors=(s2,))).initialise(2)
    parts = start_from(model, str(tmp_path / "start"))
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(transfer_table(parts, "start"))
    text = console.export_text()
    for part in parts:
        assert part.name in text
        assert part.status in text


@pytest.mark.parametrize("sensors", [slice(1), slice(1, None), slice(None)])
def test_a_model_of_another_width_is_refused(tmp_path, sensors):
    size = dataclasses.replace(small_config().size, width=40, decoder_width=48)
    save(tmp_path, size=size, sensors=small_sensors()[:1])
    model = Maestro(small_config(sensors=small_sensors()[sensors])).initialise(0)
    with pytest.raises(ExportError, match="its encoder has width 40, this model's has width 32"):
        start_from(model, str(tmp_path / "start"))


def test_a_model_of_another_width_and_patch_is_refused(tmp_path):
    size = dataclasses.replace(small_config().size, width=40, decoder_width=48)
    aerial, *rest = small_sensors()
    save(tmp_path, size=size, sensors=(dataclasses.replace(aerial, image_size=40, patch=10), *rest))
    with pytest.raises(ExportError, match="its encoder has width 40"):
        start_from(Maestro(small_config()).initialise(0), str(tmp_path / "start"))


def test_a_decoder_of_another_width_does_not_keep_the_encoder_from_being_loaded(tmp_path):
    size = dataclasses.replace(small_config().size, decoder_width=48)
    aerial, *rest = small_sensors()
    save(tmp_path, size=size, sensors=(dataclasses.replace(aerial, image_size=40, patch=10), *rest))
    model = Maestro(small_config()).initialise(0)
    found = statuses(start_from(model, str(tmp_path / "start")))
    assert found["encoders.s2"] == found["inter"] == {"loaded"}
    assert "initialised" in found["decoders.s2"]
