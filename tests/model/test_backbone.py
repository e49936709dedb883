"""The encoder as a backbone: which tokens its maps are, shapes and errors, and exported programs."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from testkit.models import TINY, full_batch, small_config, small_sensors

from maestro_scale.datasets.spec import Scale, Target
from maestro_scale.model.backbone import Backbone, backbone_view, without_decoder
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.decoders import UPerNet, _pooled, evenly_spread
from maestro_scale.model.maestro import Maestro


def built(**changes) -> Maestro:
    return Maestro(small_config(dataset="test", crop_m=60.0, **changes)).initialise(0).eval()


def backbone_of(model: Maestro, view=None, **options) -> Backbone:
    view = view or backbone_view(model.config)
    return Backbone(without_decoder(model, view), view, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["group", "mod", "monotemp", "shared"])
def test_the_last_map_is_the_mean_token_of_each_cell(fusion):
    model = built(fusion=fusion, spectral="token")
    backbone, batch = backbone_of(model), full_batch(model.config, 2)
    maps = backbone(batch.pixels, batch.dates, batch.ref_date)
    assert [tuple(m.shape) for m in maps] == [(2, channels, 4, 4) for channels in backbone.out_channels]
    assert backbone.out_channels == [4 * 32] * 3
    tokens = model.encode(batch)
    width = model.config.size.width
    found = maps[-1].split(width, dim=1)
    for name, part in zip(tokens, found, strict=True):
        mean = tokens[name].mean(dim=1).transpose(1, 2)
        side = round(mean.shape[-1] ** 0.5)
        expected = mean.unflatten(-1, (side, side))
        if side != 4:
            expected = F.interpolate(expected, size=(4, 4), mode="bilinear")
        assert torch.allclose(part, expected, atol=1e-6)
    mean = backbone_of(model, merge="mean")(batch.pixels, batch.dates, batch.ref_date)[-1]
    assert torch.allclose(mean, torch.stack(found).mean(dim=0), atol=1e-6)


@torch.no_grad()
def test_a_depth_is_what_a_shallower_encoder_ends_with():
    model = built()  # two blocks per group and one over all
    batch = full_batch(model.config, 2)
    layout = model.layout(model.view("test"), None, batch.ref_date)
    by_depth = model.tokens_at_depths(layout, batch.pixels, batch.dates, batch.ref_date, (0, 1, 2))
    for depth in (1, 2):
        config = dataclasses.replace(model.config, size=dataclasses.replace(TINY, depth=depth), inter_depth=0)
        shallow = Maestro(config).eval()
        state = model.state_dict()
        shallow.load_state_dict({name: state[name] for name in shallow.state_dict()})
        for name, tokens in shallow.encode(batch).items():
            assert torch.equal(by_depth[depth - 1][name], tokens)
    (alone,) = model.tokens_at_depths(layout, batch.pixels, batch.dates, batch.ref_date, (2,))
    assert all(torch.equal(alone[name], tokens) for name, tokens in by_depth[2].items())


@torch.no_grad()
def test_options_choose_sensors_dates_depths_and_scales():
    model = built()
    view = backbone_view(model.config, sensors=["s2"], num_dates={"s2": 2})
    backbone = backbone_of(model, view, out_indices=(0, -1), scales=(2, 1 / 3), frozen=True)
    assert (backbone.grid, backbone.out_channels, backbone.out_indices) == (3, [32, 32], (0, 2))
    for numbers in (np.array([0, 2]), torch.tensor([0, -1])):
        assert backbone_of(model, view, out_indices=numbers).out_indices == (0, 2)
    assert backbone_of(model, view, out_indices=np.int64(-1)).out_indices == (2,)
    assert not any(p.requires_grad for p in backbone.parameters())
    batch = full_batch(model.config, 2)
    pixels, dates = batch.pixels["s2"][:, :2], batch.dates["s2"][:, :2]
    maps = backbone(pixels, {"s2": dates})
    assert [tuple(m.shape) for m in maps] == [(2, 32, 6, 6), (2, 32, 1, 1)]
    assert torch.equal(maps[0], backbone({"s2": pixels}, {"s2": dates}, dates[:, 0])[0])
    assert not torch.allclose(maps[0], backbone(pixels)[0]), "dates are part of the input"
    wider = backbone_view(model.config, sensors=["s2"], crop_m=120.0)
    assert backbone_of(model, wider).grid == 6


def test_gradients_reach_every_parameter_but_the_decoder_is_not_there():
    model = built()
    backbone, batch = backbone_of(model, grid=4), full_batch(model.config, 2)
    net = UPerNet(backbone.out_channels, num_outputs=3, side=5)
    net(backbone(batch.pixels, batch.dates, batch.ref_date)).square().sum().backward()
    unused = [n for n, p in [*backbone.named_parameters(), *net.named_parameters()] if p.grad is None]
    assert unused == []
    assert not any("decoder" in n or "to_pixels" in n for n, _ in backbone.named_parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: backbone_view(m.config, sensors=["s3"]), "has no sensor 's3'; it has: aerial, s2"),
        (lambda m, b: backbone_view(m.config, crop_m=50.0), "use a multiple of"),
        (lambda m, b: backbone_view(m.config, num_dates={"s2": 0}), "num_dates: s2 has 0"),
        (lambda m, b: backbone_of(m, out_indices=(3,)), r"out_indices \(3,\): give ascending .* 0 to 2"),
        (lambda m, b: backbone_of(m, out_indices=(1, 0)), "ascending"),
        (lambda m, b: backbone_of(m, out_indices="01"), "give ascending"),
        (lambda m, b: backbone_of(m, grid=0), "grid 0: give a whole number of cells per side, at least 1"),
        (lambda m, b: backbone_of(m, grid=3.5), "grid 3.5: give a whole number"),
        (lambda m, b: backbone_of(m, scales=(1, 1, math.nan)), "give 3 positive numbers"),
        (
            lambda m, b: backbone_view(m.config, num_dates=3),
            "num_dates 3: give dates by sensor, .* {'aerial': 2}",
        ),
        (lambda m, b: backbone_view(m.config, num_dates={"s2": 1.5}), "num_dates: s2 has 1.5; give a whole"),
        (lambda m, b: backbone_view(m.config, dataset="other"), "has no dataset 'other'; it has: test"),
        (lambda m, b: backbone_of(m, scales=(1,)), "give 3 positive numbers"),
        (lambda m, b: backbone_of(m, merge="sum"), "use concat or mean"),
        (
            lambda m, b: backbone_of(m)(b.pixels["s2"]),
            "the model has the sensors aerial, s2, s1_asc, s1_des: give",
        ),
        (lambda m, b: backbone_of(m)({"s2": b.pixels["s2"]}), "sensor aerial is missing; .*sensors="),
        (
            lambda m, b: backbone_of(m)({**b.pixels, "s2": b.pixels["s2"][:, :2]}),
            r"sensor s2: 2 dates of 10 bands, but the backbone has 4 of 10; .* num_dates=\{'s2': 2\}",
        ),
        (lambda m, b: backbone_of(m)(b.pixels, {"s2": b.dates["s2"][:, :1]}), "dates .* for images"),
        (
            lambda m, b: backbone_of(m)({**b.pixels, "s2": b.pixels["s2"][0, 0]}),
            "give .B, dates, bands, H, W.",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(call, message):
    model = built()
    with pytest.raises(ValueError, match=message) as error:
        call(model, full_batch(model.config, 2))
    assert "\n" not in str(error.value)


def small_program() -> tuple[Backbone, tuple]:
    """Of two sensors, one of them in logarithms, on several dates."""
    sensors = small_sensors()
    sensors = (sensors[1], dataclasses.replace(sensors[2], scale=Scale("log", 5.0)))
    config = ModelConfig(sensors, dataclasses.replace(TINY, depth=2), 12, inter_depth=1, dataset="test")
    batch = full_batch(config, 2)
    backbone = Backbone(Maestro(config, decodes=False).initialise(0), config).eval()
    return backbone, (batch.pixels, batch.dates, batch.ref_date)


@torch.no_grad()
def test_an_exported_program_gives_the_same_maps_for_any_batch_size():
    backbone, inputs = small_program()
    size = torch.export.Dim("size", max=64)
    by_sensor = {name: {0: size} for name in inputs[0]}
    program = torch.export.export(backbone, inputs, dynamic_shapes=(by_sensor, by_sensor, {0: size}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    pixels, dates, ref_date = inputs
    three = ({n: x[[0, 1, 1]] for n, x in pixels.items()}, {n: x[[0, 1, 1]] for n, x in dates.items()})
    for given in (inputs, (*three, ref_date[[0, 1, 1]])):
        for ours, theirs in zip(backbone(*given), loaded(*given), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="its exporter writes functions, which it then refuses"
)
@torch.no_grad()
def test_onnx_runtime_agrees(tmp_path):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="needs the onnx extra")
    import onnxruntime

    backbone, inputs = small_program()
    path = tmp_path / "backbone.onnx"
    torch.onnx.export(backbone, inputs, path, dynamo=True)
    session = onnxruntime.InferenceSession(path)
    pixels, dates, ref_date = inputs
    values = [x.numpy() for x in (*pixels.values(), *dates.values(), ref_date)]
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, values, strict=True)))
    for ours, theirs in zip(backbone(*inputs), found, strict=True):
        assert torch.allclose(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)


# -- decoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "bins"), [(5, 1), (5, 2), (7, 3), (8, 6), (2, 6)])
def test_pooling_by_matrices_is_adaptive_pooling(size, bins):
    x = torch.randn(2, 3, size, size)
    assert torch.allclose(_pooled(x, bins), F.adaptive_avg_pool2d(x, min(bins, size)), atol=1e-6)


@pytest.mark.parametrize(("side", "finest"), [(1, 1), (2, 2), (5, 1), (16, 4)])
def test_upernet_predicts_each_pixel(side, finest):
    net = UPerNet([8, 8, 8, 8], num_outputs=3, side=side)
    assert net.finest == finest
    for cells in (1, 5):
        maps = [torch.randn(2, 8, cells, cells) for _ in range(4)]
        assert net(maps).shape == (2, 3, cells * side, cells * side)


def test_depths_are_evenly_spread():
    assert evenly_spread(12, 4) == (2, 5, 8, 11)
    assert evenly_spread(24, 4) == (5, 11, 17, 23)
    assert evenly_spread(3, 4) == (0, 1, 2)
    assert evenly_spread(1, 4) == (0,)


TARGETS = (
    Target("cover", "segmentation", ("wood", "void", "lake"), ignored=(1,)),
    Target("height", "regression", resolution_m=3.0, units="m"),
)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["attentive", "linear", "upernet"])
def test_every_decoder_predicts_maps_alike_whatever_the_batch(decoder):
    model = built(heads=TARGETS, ref_sensor="aerial", decoder=decoder)
    batch = full_batch(model.config, 3)
    outputs = model.head_outputs(batch)
    assert {n: tuple(x.shape) for n, x in outputs.items()} == {
        "cover": (3, 2, 20, 20),
        "height": (3, 1, 20, 20),
    }
    for name, x in model.head_outputs(batch.first()).items():
        assert torch.allclose(x, outputs[name][:1], atol=1e-5)
    fewer = model.predict({"s2": batch.pixels["s2"], "aerial": batch.pixels["aerial"]}, "cover")
    assert fewer.probabilities.shape == (3, 2, 20, 20)
    assert fewer.probabilities.isfinite().all()
    model.heads["height"].set_scale(10.0, 2.0)
    assert torch.allclose(model.heads["height"].in_units(outputs["height"]), outputs["height"] * 2 + 10)


def test_the_config_of_the_first_decoder_is_as_before():
    config = small_config(heads=TARGETS, ref_sensor="aerial")
    assert "decoder" not in config.to_dict()
    changed = dataclasses.replace(config, decoder="upernet")
    assert ModelConfig.from_dict(changed.to_dict()) == changed
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(
        ValueError, match="upernet predicts maps, and a is a label of the whole tile: use attentive"
    ):
        small_config(heads=(Target("a", "multilabel", ("x",)),), decoder="upernet")
    alone = Maestro(small_config(heads=(Target("a", "multilabel", ("x",)),), decoder="linear")).initialise(0)
    assert alone.head_outputs(full_batch(alone.config, 2))["a"].shape == (2, 1)


@torch.no_grad()
def test_predictions_of_every_kind_of_target():
    heads = (
        Target("species", "multilabel", ("oak", "pine", "rest")),
        Target("soil", "classification", ("clay", "unknown", "sand"), ignored=(1,)),
        Target("age", "regression", units="years"),
        *TARGETS,
    )
    model = built(heads=heads, ref_sensor="aerial")
    batch = full_batch(model.config, 2)
    model.heads["age"].set_scale(40.0, 5.0)
    found = {t.name: model.predict(batch, t.name) for t in heads}
    outputs = model.head_outputs(batch)
    assert torch.equal(found["species"].values, outputs["species"] > 0)
    assert found["species"].classes == {0: "oak", 1: "pine", 2: "rest"}
    assert found["soil"].classes == {0: "clay", 2: "sand"}
    assert found["soil"].values.tolist() == [(0, 2)[i] for i in outputs["soil"].argmax(1).tolist()]
    assert torch.allclose(found["soil"].probabilities.sum(1), torch.ones(2))
    assert (found["age"].units, found["age"].probabilities, found["age"].classes) == ("years", None, {})
    assert torch.allclose(found["age"].values, outputs["age"][:, 0] * 5 + 40)
    assert set(found["cover"].values.unique().tolist()) <= {0, 2}
    assert found["height"].values.shape == (2, 20, 20)
    with pytest.raises(ValueError, match="target None: the model predicts species, soil, age, cover, height"):
        model.predict(batch)
