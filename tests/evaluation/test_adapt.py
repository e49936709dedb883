"""Adapting an encoder to a dataset that it was not trained on."""

import dataclasses

import pytest
import torch

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.evaluation.features.adapt import adapt_encoder
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.model.maestro import Maestro
from tests.testkit.models import full_batch, small_config, small_sensors

MODEL = Maestro(small_config(dataset="here")).initialise(1).eval()


def spec_of(*sensors, name="there"):
    return DatasetSpec(name, name, 60.0, 60.0, 12, (), (), tuple(sensors))


def by_name(which, /, **changes):
    (sensor,) = (s for s in small_sensors() if s.name == which)
    return dataclasses.replace(sensor, **changes)


def test_the_dataset_it_was_trained_on_needs_nothing():
    adapted, notes = adapt_encoder(MODEL, spec_of(*small_sensors(), name="here"))
    assert adapted is MODEL
    assert notes == []


def test_a_sensor_of_another_name_is_read_by_shared_weights():
    radar = by_name("s1_asc", name="s1", num_dates=3)
    adapted, notes = adapt_encoder(MODEL, spec_of(radar))
    assert notes == ["there is encoded from s1"]
    batch = full_batch(adapted.config, 2)
    with torch.no_grad():
        seen = adapted.encode(batch)["s1"]
        own = MODEL.patch_embed["s1_asc"]
    assert seen.shape == (2, 3, 9, 32)
    torch.testing.assert_close(adapted.patch_embed["s1_asc"].state_dict(), own.state_dict())
    for name, tensor in adapted.encoders["s1"].state_dict().items():
        torch.testing.assert_close(tensor, MODEL.encoders["s1"].state_dict()[name])


def test_sensors_get_the_token_groups_of_the_model():
    model = Maestro(small_config(dataset="here", spectral="token")).initialise(1).eval()
    # As a dataset describes them, and the recipe of an evaluation does not say that tokens are groups.
    sensors = [dataclasses.replace(s, token_groups=()) for s in small_sensors()]
    same, notes = adapt_encoder(model, spec_of(*sensors, name="here"))
    assert (same is model, notes) == (True, [])
    other, _ = adapt_encoder(model, spec_of(sensors[1]))
    assert other.config.sensors[0].token_groups == (4, 4, 2)
    tokens = other.encode(full_batch(other.config, 2))["s2"]
    assert tokens.shape == (2, 3 * 4, 9, 32)  # a grid of 9 tokens for each group and date


def test_a_sensor_without_weights_is_omitted_with_a_note():
    adapted, notes = adapt_encoder(
        MODEL, spec_of(by_name("aerial"), by_name("s2", name="landsat", embed="landsat", group="landsat"))
    )
    assert [s.name for s in adapted.config.sensors] == ["aerial"]
    assert "landsat is left out: the checkpoint has no embedding 'landsat'" in notes[0]
    assert notes[-1] == "there is encoded from aerial"


def test_an_encoder_that_is_finetuned_keeps_every_sensor():
    sensors = by_name("aerial"), by_name("s2", name="landsat", embed="landsat", group="landsat")
    adapted, notes = adapt_encoder(MODEL, spec_of(*sensors), trains=True)
    assert adapted.config.sensors == sensors
    assert "landsat is re-initialised: the checkpoint has no embedding 'landsat'" in notes[0]
    torch.testing.assert_close(
        adapted.patch_embed["aerial"].state_dict(), MODEL.patch_embed["aerial"].state_dict()
    )
    assert not any(t.isnan().any() for t in adapted.patch_embed["landsat"].state_dict().values())


def test_no_sensor_left_is_refused():
    with pytest.raises(EvaluationError, match="weights for none of its sensors: dem is left out"):
        adapt_encoder(MODEL, spec_of(by_name("s2", name="dem", embed="dem", group="dem")))


def test_a_shared_embedding_of_another_patch_is_refused():
    with pytest.raises(EvaluationError, match="does not fit"):
        adapt_encoder(MODEL, spec_of(by_name("aerial", patch=4)))
