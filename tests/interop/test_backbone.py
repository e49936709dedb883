"""``maestro_scale.backbone`` and ``maestro_scale.tile`` on an exported model, and under TerraTorch's interface."""

from __future__ import annotations

import datetime
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from testkit.models import TINY, full_batch, small_config
from testkit.valley import SPEC

import maestro_scale
from maestro_scale.datasets.spec import DatasetError, GeoOrigin
from maestro_scale.interop.export import ExportError, write_model
from maestro_scale.model.config import DatasetView, ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    config = small_config(norm="token", dataset="test", crop_m=60.0)
    other = DatasetView("other", (config.sensors[1],), 12, crop_m=60.0)
    model = Maestro(small_config(norm="token", dataset="test", crop_m=60.0, others=(other,))).initialise(0)
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_model(folder, model.state_dict(), model.config, {"step": 7})
    return folder


@torch.no_grad()
def test_a_backbone_of_one_dataset_of_several(exported):
    whole = maestro_scale.backbone(exported)
    assert whole.sensors == ("aerial", "s2", "s1_asc", "s1_des")
    backbone = maestro_scale.backbone(exported, dataset="other")
    assert backbone.sensors == ("s2",)
    batch = full_batch(small_config(), 2)
    model = maestro_scale.load_model(exported)
    expected = model.embed(
        {"s2": batch.pixels["s2"]}, dates={"s2": batch.dates["s2"]}, ref_date=batch.ref_date
    )
    (*_, last) = backbone(batch.pixels["s2"], {"s2": batch.dates["s2"]}, batch.ref_date)
    assert torch.allclose(last.mean(dim=(2, 3)), expected.vector, atol=1e-5)
    assert sum(p.numel() for p in backbone.parameters()) < sum(p.numel() for p in whole.parameters())
    with pytest.raises(ValueError, match="has no dataset 'third'; it has: test, other"):
        maestro_scale.backbone(exported, dataset="third")
    with pytest.raises(ExportError, match="is not an exported model"):
        maestro_scale.backbone(exported / "nowhere")


@torch.no_grad()
def test_a_backbone_is_pickled_and_takes_equal_samples_of_all(exported):
    backbone = maestro_scale.backbone(exported, -1, sensors="s2")
    assert (backbone.out_indices, backbone.sensors) == ((backbone.depth - 1,), ("s2",))
    batch = full_batch(small_config(), 2)
    dates = {"s2": batch.dates["s2"]}
    copy = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(copy(batch.pixels["s2"], dates)[0], backbone(batch.pixels["s2"], dates)[0])
    with pytest.raises(ValueError, match=r"s2: dates \(1, .* for images \(2, "):
        backbone(batch.pixels["s2"], {"s2": dates["s2"][:1]})
    with pytest.raises(ValueError, match="s2: images of 6 by 4 pixels; give square ones"):
        backbone(batch.pixels["s2"][..., :4], dates)
    both = {"s2": batch.pixels["s2"], "aerial": batch.pixels["aerial"][:1]}
    with pytest.raises(ValueError, match="different numbers of samples: aerial 1, s2 2"):
        maestro_scale.backbone(exported, sensors=["s2", "aerial"])(both)


@torch.no_grad()
def test_a_finetuned_model_knows_the_extent_of_its_images(tmp_path):
    """``config.crop_m`` of a finetuning is None; the extent of its crops, 160 m, is in its record."""
    config = ModelConfig(
        SPEC.sensors,
        TINY,
        SPEC.pos_grid,
        inter_depth=1,
        ref_sensor="s2",
        heads=SPEC.targets,
        dataset="valley",
    )
    written = Maestro(config, decodes=False).initialise(0)
    record = Finetuned(SPEC, "cover", "miou", "finetune", 1, 0.5, 0.5)
    write_model(tmp_path / "model", written.state_dict(), config, {"step": 1}, record)
    model = maestro_scale.load_model(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(1, 4000, (3, 48, 48), np.int16)  # 480 m of 10 m pixels
    centre = model.embed(maestro_scale.tile({"s2": pixels[:, 16:32, 16:32]}, "2021-06-01")).vector
    assert torch.equal(
        model.embed(maestro_scale.tile({"s2": pixels}, "2021-06-01"), tile_m=480.0).vector, centre
    )
    # Twice the extent has 16 cells of two pixels per side, not 8.
    double = maestro_scale.tile({"s2": pixels[:, :32, :32]}, "2021-06-01")
    assert model.embed(double, crop_m=320.0).tokens["s2"].shape[2] == 16**2
    assert maestro_scale.backbone(tmp_path / "model", -1, crop_m=320.0).grid == 16
    assert maestro_scale.backbone(tmp_path / "model", -1).grid == 8


class Registry(dict):
    """That of terratorch/registry/registry.py, as far as a backbone meets it."""

    def register(self, constructor):
        self[constructor.__name__] = constructor
        return constructor

    def build(self, name, **arguments):
        return self[name](**arguments)


@torch.no_grad()
def test_terratorch_builds_it_by_name(exported, monkeypatch):
    """By its published interface (1.2): a registry by name, series (B, C, T, H, W), ``out_channels``."""
    found = Registry()
    package = types.ModuleType("terratorch")
    registry = types.ModuleType("terratorch.registry")
    registry.TERRATORCH_BACKBONE_REGISTRY = found
    monkeypatch.setitem(sys.modules, "terratorch", package)
    monkeypatch.setitem(sys.modules, "terratorch.registry", registry)
    monkeypatch.delitem(sys.modules, "maestro_scale.interop.terratorch", raising=False)
    import maestro_scale.interop.terratorch

    backbone = found.build("maestro", path=str(exported), sensors=["s2"], out_indices=[0, -1])
    batch = full_batch(small_config(), 2)
    pixels, dates = batch.pixels["s2"], batch.dates["s2"]
    maps = backbone(pixels.transpose(1, 2), temporal_coords=dates[..., :2].float(), location_coords=None)
    noon = torch.cat([dates[..., :2], torch.full_like(dates[..., :1], 12)], dim=-1)
    ours = maestro_scale.backbone(exported, [0, -1], sensors=["s2"])(pixels, {"s2": noon})
    assert [m.shape[1] for m in maps] == backbone.out_channels
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, ours, strict=True))
    both = found.build("maestro", path=str(exported))
    named = {n: x.transpose(1, 2) for n, x in batch.pixels.items()}
    assert len(both({**named, "aerial": batch.pixels["aerial"][:, 0]})) == 3
    with pytest.raises(ValueError, match="the model has the sensors aerial, s2"):
        both(pixels)
    both.freeze()
    assert not any(p.requires_grad for p in both.parameters())


# -- tiles from arrays -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
AERIAL, SERIES = RNG.integers(0, 255, (4, 20, 20), np.uint8), RNG.integers(0, 4000, (3, 10, 6, 6), np.int16)
DAYS = ["2021-02-01", datetime.datetime(2021, 6, 1, 10), np.datetime64("2021-09-01T12:00")]


@torch.no_grad()
def test_a_tile_from_arrays_embeds_like_tensors(exported):
    model = maestro_scale.load_model(exported)
    field = maestro_scale.tile(
        {"s2": SERIES, "aerial": AERIAL}, {"s2": DAYS}, origin=GeoOrigin("EPSG:2154", 9.0, 8.0)
    )
    assert field.dates["s2"].tolist() == [[2021, 32, 0], [2021, 152, 10], [2021, 244, 12]]
    assert field.dates["aerial"].tolist() == [field.ref_date.tolist()] == [[2021, 32, 0]]
    found = model.embed(field).vector
    pixels = {"aerial": torch.from_numpy(AERIAL)[None], "s2": SERIES[None]}
    when = {"s2": field.dates["s2"][None]}
    assert torch.equal(model.embed(pixels, dates=when).vector, found)
    assert maestro_scale.tile({"a": np.zeros((5, 5))}, "2021-01-02").arrays["a"].shape == (1, 1, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "has no arrays"),
        (({"s2": SERIES},), r"has no dates; give dates=\{'s2': '2021-06-01'\}"),
        (({"s2": SERIES[:0]}, []), "has no dates"),
        (({"s2": SERIES}, {"s2": DAYS[:2]}), "s2 has 3 images and 2 dates"),
        (({"s2": SERIES, "a": AERIAL}, {"a": "2021-01-01"}), "s2 has 3 images and 0 dates"),
        (({"s2": SERIES}, {"s3": DAYS}), "dates of 's3', but arrays of s2"),
        (({"s2": SERIES}, "June"), "s2 has the date 'June'"),
        (({"s2": SERIES[None]}, "2021-01-01"), r"s2 is int16 \(1, 3, 10, 6, 6\); give numbers"),
        (({"s2": SERIES}, 2021), "s2 has the date 2021"),
        (({"s2": np.where(SERIES, np.inf, 0.0)}, DAYS), "s2 has infinite values"),
        (({"s2": np.array([["a"]])}, "2021-01-01"), "give numbers"),
        (({"s2": np.ma.masked_equal(SERIES, SERIES[0, 0, 0, 0])}, "2021-01-01"), "mask"),
    ],
)
def test_a_tile_that_is_none_is_refused_in_one_line(arguments, message):
    with pytest.raises(DatasetError, match=message) as error:
        maestro_scale.tile(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, "aerial, s2, s1_asc, s1_des"),
        ({"s2": "x"}, TypeError, "s2 is str: give a tensor or an array"),
        ({"s2": torch.zeros(0, 3, 10, 6, 6)}, ValueError, "the batch has no samples"),
        (
            torch.zeros(1, 1, 4, 20, 20),
            ValueError,
            "the model has the sensors aerial, s2, s1_asc, s1_des: give",
        ),
        ({"s9": torch.zeros(1, 1, 4, 20, 20)}, ValueError, "has no sensor 's9'"),
        ({"s2": torch.zeros(1, 1, 4, 6, 6)}, ValueError, "4 bands were given, the model has 10"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(exported, data, error, message):
    model = maestro_scale.load_model(exported)
    for call in (model.embed,):
        with pytest.raises((error, ValueError), match=message) as raised:
            call(data)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="has no head to predict with: finetune it"):
        model.predict(data)
