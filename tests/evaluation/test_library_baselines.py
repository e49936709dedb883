"""Encoders of torchgeo and terratorch: bands, units, weights and errors with small modules of the libraries' interface;
the real libraries' interface where they are installed (``python -m benchmarks.external_baselines`` installs them)."""

import copy
import dataclasses
import importlib.util
import inspect
import math
import re
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn

from maestro_scale.datasets.pastis_hd.reader import SPEC as PASTIS
from maestro_scale.datasets.treesatai_ts.reader import SPEC as TREESATAI
from maestro_scale.evaluation.baselines import terratorch, torchgeo
from maestro_scale.evaluation.baselines.bands import COMMON, find_readings, model_input
from maestro_scale.evaluation.baselines.inputs import sensor_inputs
from maestro_scale.evaluation.baselines.library import Metadata, resize_positions
from maestro_scale.evaluation.baselines.protocol import Images
from maestro_scale.evaluation.baselines.registry import build_baseline
from maestro_scale.evaluation.baselines.terratorch import TerraTorch, sequence_length, week_and_hour
from maestro_scale.evaluation.baselines.torchgeo import TorchGeo, days_since_1970
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.recipe import load_recipe

WIDTH = 8


class FakeEmbedding(nn.Module):
    """The patch embedding of torchgeo's DOFA: ``forward(x, wavelengths) -> (tokens, waves)``."""

    def __init__(self, patch):
        super().__init__()
        self.patch = patch
        self.kernel = nn.Parameter(torch.randn(WIDTH))
        self.wavelengths = []

    def forward(self, x, wavelengths):
        assert wavelengths.shape == (x.shape[1],)
        self.wavelengths.append([round(w, 4) for w in wavelengths.tolist()])
        means = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), self.patch)
        return means.flatten(2).transpose(1, 2) * self.kernel, wavelengths


class FakeDofa(nn.Module):
    """The members of torchgeo's DOFA that are used."""

    def __init__(self, weights=None):
        super().__init__()
        self.patch_size, self.embed_dim, self.weights = 16, WIDTH, weights
        self.patch_embed = FakeEmbedding(16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.fc_norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 45)


@dataclasses.dataclass
class FakeWeights:
    """A torchvision ``Weights``."""

    meta: dict


@pytest.fixture
def fake_torchgeo(monkeypatch):
    members = {"DOFA_MAE": FakeWeights({}), "OTHER": FakeWeights({"in_chans": 7})}
    models = types.ModuleType("torchgeo.models")
    models.get_model = lambda name, **arguments: FakeDofa(**arguments)
    models.get_model_weights = lambda name: types.SimpleNamespace(__members__=members)
    package = types.ModuleType("torchgeo")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchgeo", package)
    monkeypatch.setitem(sys.modules, "torchgeo.models", models)


class FakePrithvi(nn.Module):
    """The members of terratorch's PrithviViT that are used."""

    def __init__(self, num_frames):
        super().__init__()
        self.num_frames, self.embed_dim = num_frames, WIDTH
        self.patch_embed = types.SimpleNamespace(patch_size=(1, 16, 16))
        self.kernel = nn.Parameter(torch.ones(WIDTH))
        self.calls = []

    def forward_features(self, x, temporal_coords=None, location_coords=None):
        self.calls.append((tuple(x.shape), temporal_coords, location_coords))
        n = len(x)
        cells = nn.functional.avg_pool2d(x.mean(dim=1), 16)  # (N, T, h, w)
        tokens = cells.reshape(n, -1, 1) * self.kernel
        return [torch.cat([torch.zeros(n, 1, WIDTH), tokens], dim=1)]


@pytest.fixture
def fake_terratorch(monkeypatch):
    registry = types.SimpleNamespace(build=lambda name, pretrained, num_frames: FakePrithvi(num_frames))
    package = types.ModuleType("terratorch")
    package.BACKBONE_REGISTRY = registry
    monkeypatch.setitem(sys.modules, "terratorch", package)


def images(spec, size=2, latlon=None):
    """Images in physical units: radar -12 dB, reflectance 0.2, brightness 0.4, one date a month."""
    sensors = sensor_inputs(spec)
    values = {"dB": -12.0, "reflectance": 0.2, "brightness": 0.4}
    pixels, dates = {}, {}
    for s in sensors.values():
        pixels[s.name] = torch.full((size, s.num_dates, len(s.bands), s.size, s.size), values[s.units[0]])
        day = 1 + 20 * torch.arange(s.num_dates)
        date = torch.stack([torch.full_like(day, 2019), day, torch.full_like(day, 12)], dim=1)
        dates[s.name] = date.to(torch.int16).expand(size, -1, -1)
    return Images(pixels, dates, torch.full((size, 2), math.nan) if latlon is None else latlon)


def with_sensors(spec, *names):
    return dataclasses.replace(spec, sensors=tuple(s for s in spec.sensors if s.name in names))


@pytest.mark.usefixtures("fake_torchgeo")
def test_wavelengths_reach_a_spectral_model_in_micrometres():
    encoder = TorchGeo(sensor_inputs(TREESATAI), {"model": "dofa_base_patch16_224@untrained"})
    tokens = encoder.tokens(images(TREESATAI))
    assert {k: tuple(v.shape) for k, v in tokens.items()} == {
        "aerial": (2, 1, 225, WIDTH),
        "s2": (2, 16, 9, WIDTH),
        "s1_asc": (2, 4, 9, WIDTH),
        "s1_des": (2, 4, 9, WIDTH),
    }
    aerial, s2, asc, _ = encoder.adapter.backbone.patch_embed.wavelengths
    assert aerial == [0.83, 0.66, 0.56, 0.485]  # NIR, R, G, B: the order of the dataset
    assert s2 == [0.492, 0.56, 0.665, 0.704, 0.741, 0.783, 0.833, 0.865, 1.614, 2.202]
    assert asc == [5.405, 5.405]


@pytest.mark.usefixtures("fake_torchgeo")
def test_a_baseline_of_a_library_is_built_by_name(tmp_path):
    recipe = load_recipe("recipes/eval/treesatai_ts.yaml", [])
    baseline = build_baseline("torchgeo:dofa_base_patch16_224@untrained", recipe, TREESATAI)
    assert baseline.width == WIDTH
    assert "aerial: B8 B4 B3 B2" in baseline.adaptation
    scratch = baseline.reinitialised(3)
    kernel = scratch.encoder.adapter.backbone.patch_embed.kernel
    assert not torch.equal(kernel, baseline.encoder.adapter.backbone.patch_embed.kernel)
    assert torch.equal(kernel, baseline.reinitialised(3).encoder.adapter.backbone.patch_embed.kernel)


@pytest.mark.usefixtures("fake_torchgeo")
def test_weights_are_published_random_or_of_a_file(tmp_path):
    def build(weights):
        return TorchGeo(
            sensor_inputs(TREESATAI), {"model": f"dofa_base_patch16_224{weights}"}
        ).adapter.backbone

    assert build("").weights is build("@DOFA_MAE").weights is not None
    assert build("@untrained").weights is None
    assert torch.equal(build("@untrained").cls_token, build("@random").cls_token)
    trained = FakeDofa()
    trained.pos_embed.data = torch.randn(1, 10, WIDTH)  # of another grid
    state = {f"encoder.{k}": v for k, v in trained.state_dict().items() if not k.startswith("fc_norm")}
    torch.save({"model": state}, tmp_path / "dofa.pt")
    loaded = build(f"@{tmp_path / 'dofa.pt'}")
    assert torch.equal(loaded.cls_token, trained.cls_token)
    assert torch.equal(loaded.pos_embed, trained.pos_embed)
    torch.save({k: v for k, v in state.items() if "kernel" not in k}, tmp_path / "other.pt")
    for weights, message in (
        ("@DOFA_MEA", "did you mean 'DOFA_MAE'"),
        (f"@{tmp_path / 'other.pt'}", "has no patch_embed.kernel"),
        ("@nowhere/dofa.pt", "the weights file nowhere/dofa.pt does not exist"),
    ):
        with pytest.raises(EvaluationError, match=message):
            build(weights)


@pytest.mark.usefixtures("fake_torchgeo")
def test_errors_name_model_weights_and_bands():
    sensors = sensor_inputs(TREESATAI)
    aerial = {"aerial": sensors["aerial"]}
    for model, found, message in (
        ("dofa_base_patch16", sensors, "did you mean 'dofa_base_patch16_224'"),
        ("dofa_small_patch16_224", sensors, "dofa_small_patch16_224 has no published weights"),
        ("vit_small_patch16_224@OTHER", sensors, "reads 7 bands; supported are weights of 13"),
        ("croma_base@untrained", aerial, r"aerial \(image\) lacks B5, B6, B7, B8A, B9, B11, B12"),
    ):
        with pytest.raises(EvaluationError, match=message):
            TorchGeo(found, {"model": model})
    with pytest.raises(EvaluationError, match=r"aerial \(image\) lacks B8A, B11, B12"):
        TerraTorch(aerial, {"model": "prithvi_eo_v2_300@untrained"})
    with pytest.raises(EvaluationError, match="no option 'patch'"):
        TorchGeo(sensors, {"model": "croma_base", "patch": "8"})


@pytest.mark.usefixtures("fake_torchgeo")
def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    def get_model(name, **arguments):
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(sys.modules["torchgeo.models"], "get_model", get_model)
    with pytest.raises(
        EvaluationError, match=r"DOFA_MAE of dofa_base_patch16_224 cannot be downloaded \(.*@FILE"
    ):
        TorchGeo(sensor_inputs(TREESATAI), {"model": "dofa_base_patch16_224"})


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchgeo", None)  # importing it raises ImportError
    with pytest.raises(EvaluationError, match=re.escape("pip install 'torchgeo>=0.8,<0.9'")):
        TorchGeo(sensor_inputs(TREESATAI), {"model": "croma_base@untrained"})


@pytest.mark.usefixtures("fake_terratorch")
def test_prithvi_reads_sequences_with_their_dates():
    encoder = TerraTorch(sensor_inputs(TREESATAI), {"model": "prithvi_eo_v2_300_tl@untrained"})
    given = images(TREESATAI)
    given.pixels["s2"][:, 5, :, 2:4, :2] = 0.9  # date 6 of 16: brighter in the cell at row 2, column 1
    tokens = encoder.tokens(given)["s2"]
    assert tokens.shape == (2, 16, 9, WIDTH)
    assert encoder.adaptation.endswith(
        "Reads s2: B2 B3 B4 B8A B11 B12. Left out: aerial (image) lacks B8A, B11, B12; "
        "s1_asc (sentinel-1) is not read by it; s1_des (sentinel-1) is not read by it."
    )
    ((shape, dates, place),) = encoder.adapter.backbone.calls
    assert shape == (8, 6, 4, 48, 48)  # 2 samples of 4 sequences of 4 dates; 3 cells of 16 pixels
    assert dates[1].tolist() == [[2019, 81], [2019, 101], [2019, 121], [2019, 141]]
    assert place is None
    assert tokens[0, :, :, 0].argmax() == 5 * 9 + 3
    assert sequence_length([16], 4) == 4
    assert sequence_length([16, 6], 4) == 2
    assert sequence_length([5], 4) == 1


@pytest.mark.usefixtures("fake_terratorch")
def test_tokens_do_not_depend_on_whether_the_places_of_other_samples_are_known():
    encoder = TerraTorch(sensor_inputs(TREESATAI), {"model": "prithvi_eo_v2_300_tl@untrained"})
    latlon = torch.tensor([[math.nan, math.nan], [48.0, 2.0], [math.nan, math.nan]])
    given = images(TREESATAI, 3, latlon)
    for i, value in enumerate((0.1, 0.2, 0.3)):
        given.pixels["s2"][i] = value
    tokens = encoder.tokens(given)["s2"]
    places = [place for _, _, place in encoder.adapter.backbone.calls]
    assert [None if p is None else p.tolist() for p in places] == [[[48.0, 2.0]] * 4, None]
    level = tokens.mean(dim=(1, 2, 3))
    assert level[0] < level[1] < level[2]


def test_bands_are_selected_standardised_and_replaced():
    sensors = sensor_inputs(with_sensors(TREESATAI, "s2"))
    bands = ("B1", "B4", "B8A", "B9", "B10")
    (reading,), _ = find_readings(sensors, {"sentinel-2": bands}, COMMON, subset=False)
    assert reading.channels == (0, 2, 7, 7, None)  # B1 is B2, B9 is B8A
    assert reading.replaced == " (B1 is B2, B9 is B8A, B10 is 0)"
    pixels = torch.arange(10.0)[:, None, None].expand(1, 16, 10, 6, 6) / 10
    x = model_input(reading, pixels, dict.fromkeys(bands, (0.1, 0.5)), 12)
    assert x.shape == (1, 16, 5, 12, 12)
    np.testing.assert_allclose(x[0, 3, :, 5, 5], [-0.2, 0.2, 1.2, 1.2, 0.0], atol=1e-6)
    (reading,), _ = find_readings(sensors, {"sentinel-2": bands}, COMMON, subset=True)
    assert reading.bands == ("B4", "B8A")


def test_statistics_are_in_the_units_of_the_protocol():
    assert COMMON["reflectance"]["B4"] == pytest.approx((0.185391, 0.2134138))
    assert COMMON["reflectance"]["B12"] == pytest.approx((0.1857648, 0.1334311))
    assert COMMON["dB"]["VH"] == pytest.approx((-20.293, 5.89))
    assert COMMON["brightness"]["B2"] == pytest.approx((93.29 / 255, 34.851 / 255))
    hls = TerraTorch.models["prithvi_eo_v2_300"].statistics["reflectance"]
    assert hls["B8A"] == pytest.approx((0.2734, 0.185))


def test_radar_has_codes_of_polarisation_and_orbit():
    readings, _ = find_readings(sensor_inputs(PASTIS), torchgeo._ANY, COMMON, subset=False)
    ids = {r.sensor.name: torchgeo.Panopticon.channel_ids(torchgeo.Panopticon, r) for r in readings}
    assert ids == {
        "spot": [660, 560, 485],
        "s2": [492, 560, 665, 704, 741, 783, 833, 865, 1614, 2202],
        "s1_asc": [-5, -6],
        "s1_des": [-9, -10],
    }


def test_dates_of_metadata():
    dates = torch.tensor([[[1970, 1, 0], [2000, 60, 6], [2020, 366, 12]]], dtype=torch.int16)
    # 2000-02-29 and 2020-12-31
    assert days_since_1970(dates).tolist() == [[0, 11016, 18627]]
    week = week_and_hour(dates)
    np.testing.assert_allclose(week[0, 1, 2:], [1, 0], atol=1e-6)  # six o'clock: a quarter of a day
    np.testing.assert_allclose(week[0, 1, 0], math.sin(2 * math.pi * 9 / 52), atol=1e-6)


def test_positions_keep_their_order_when_resized():
    table = torch.arange(16.0).reshape(1, 16, 1)
    resized = resize_positions(table, 2).flatten()
    assert resized.argsort().tolist() == [0, 1, 2, 3]
    assert resize_positions(table, 4) is table


# The interface of the real libraries: signatures that the fakes above follow.


@pytest.fixture(scope="module")
def real_torchgeo():
    return _real("torchgeo")


@pytest.fixture(scope="module")
def real_terratorch():
    return _real("terratorch")


def _real(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(
            f"{name} is not installed: python -m benchmarks.external_baselines --venv DIR installs it"
        )
    return importlib.import_module(name)


def test_torchgeo_has_the_models_and_weights_of_the_table(real_torchgeo):
    models = importlib.import_module("torchgeo.models")
    for name, model in TorchGeo.models.items():
        assert name in models.list_models()
        if model.weights:
            assert model.weights in models.get_model_weights(name).__members__
    dofa = importlib.import_module("torchgeo.models.dofa")
    assert list(inspect.signature(dofa.DOFAEmbedding.forward).parameters) == ["self", "x", "wavelengths"]


def test_terratorch_has_the_models_of_the_table(real_terratorch):
    registry = real_terratorch.BACKBONE_REGISTRY
    for name in TerraTorch.models:
        if name != "clay_v1_base":  # registered with timm
            assert name in registry
    prithvi = importlib.import_module("terratorch.models.backbones.prithvi_mae")
    parameters = list(inspect.signature(prithvi.PrithviViT.forward_features).parameters)
    assert parameters == ["self", "x", "temporal_coords", "location_coords"]


def test_the_statistics_of_prithvi_are_those_of_terratorch(real_terratorch):
    library = importlib.import_module("terratorch.models.backbones.prithvi_vit")
    for name, mean, deviation in (
        ("prithvi_eo_v1_100", library.PRITHVI_V1_MEAN, library.PRITHVI_V1_STD),
        ("prithvi_eo_v2_300", library.PRITHVI_V2_MEAN, library.PRITHVI_V2_STD),
    ):
        ours = TerraTorch.models[name].statistics["reflectance"].values()
        np.testing.assert_allclose(np.array(list(ours)).T * 1e4, [mean, deviation])


def test_the_common_statistics_are_those_of_terratorch(real_terratorch):
    path = "terratorch.models.backbones.terramind.model.terramind_register"
    register = importlib.import_module(path)
    for unit, key, scale in (("reflectance", "untok_sen2l2a@224", 1e4), ("dB", "untok_sen1grd@224", 1)):
        expected = [register.v1_pretraining_mean[key], register.v1_pretraining_std[key]]
        np.testing.assert_allclose(np.array(list(COMMON[unit].values())).T * scale, expected)


@pytest.mark.parametrize("name", ["terramind_v1_tiny", "prithvi_eo_v2_tiny_tl"])
def test_a_date_changes_only_the_tokens_that_may_see_it(real_terratorch, name):
    encoder = TerraTorch(sensor_inputs(with_sensors(TREESATAI, "s2")), {"model": f"{name}@untrained"})
    given = images(with_sensors(TREESATAI, "s2"))
    with torch.no_grad():
        before = encoder.tokens(given)["s2"]
        given.pixels["s2"][:, 5] = 0.5
        changed = (encoder.tokens(given)["s2"] != before).flatten(2).any(dim=2)[0]
    expected = {5} if name.startswith("terramind") else {4, 5, 6, 7}  # a sequence of four dates
    assert set(torch.nonzero(changed).flatten().tolist()) == expected


def reading_of(sensor, reads, grid):
    """How a model reads a sensor of TreeSatAI-TS whose token grid has another size."""
    (reading,), _ = find_readings(
        sensor_inputs(with_sensors(TREESATAI, sensor)), reads, {**COMMON, "reflectance": {}}, subset=False
    )
    return dataclasses.replace(reading, sensor=dataclasses.replace(reading.sensor, grid=grid))


# At the image size that a module was built for, an adapter's tokens are those of the module's own forward pass.
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
UNKNOWN = Metadata(torch.zeros(2, 1, 3, dtype=torch.int16), None)


@torch.no_grad()
def test_dofa_gives_the_tokens_of_its_own_forward(real_torchgeo):
    dofa = importlib.import_module("torchgeo.models.dofa")
    own = dofa.DOFA(img_size=48, patch_size=16, num_classes=3, **SMALL).eval()
    own.pos_embed.normal_()
    norm, reading = own.fc_norm, reading_of("s2", torchgeo._ANY, 3)
    x = torch.rand(2, 1, 10, 48, 48)
    expected = own.forward_features(x[:, 0], [w / 1000 for w in reading.wavelengths_nm])
    tokens = torchgeo.Dofa(own, None, [reading])(x, reading, UNKNOWN)
    torch.testing.assert_close(norm(tokens[:, 0].mean(dim=1)), expected)


@torch.no_grad()
def test_vision_transformers_give_the_tokens_of_their_own_forward(real_torchgeo):
    timm, scale_mae = (importlib.import_module(m) for m in ("timm", "torchgeo.models.scale_mae"))
    reading = reading_of("s2", {"sentinel-2": ("B4", "B3", "B2")}, 3)
    metres = reading.pixel_m(48)
    assert metres == pytest.approx(1.25)  # 60 m in 48 pixels
    x = torch.rand(2, 1, 3, 48, 48)
    for adapter, own in (
        (torchgeo.TimmVit, timm.create_model("vit_small_patch16_224", img_size=48, **SMALL).eval()),
        (torchgeo.ScaleMae, scale_mae.ScaleMAE(metres, 48, 16, **SMALL).eval()),
    ):
        expected = own.forward_features(x[:, 0])[:, 1:]
        torch.testing.assert_close(adapter(own, None, [reading])(x, reading, UNKNOWN)[:, 0], expected)


@torch.no_grad()
def test_panopticon_gives_the_tokens_of_its_own_forward(real_torchgeo):
    own = importlib.import_module("torchgeo.models.panopticon").Panopticon(img_size=42).eval()
    reading = reading_of("s1_des", {"sentinel-1": ("VV", "VH")}, 3)
    x = torch.rand(2, 1, 2, 42, 42)
    ids = torch.tensor([[-9.0, -10.0]]).repeat(2, 1)
    expected = own.model.forward_features({"imgs": x[:, 0], "chn_ids": ids})[:, 1:]
    found = torchgeo.Panopticon(own, None, [reading])(x, reading, UNKNOWN)[:, 0]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_copernicus_fm_gives_the_tokens_of_its_own_forward(real_torchgeo):
    library = importlib.import_module("torchgeo.models.copernicusfm")
    own = library.CopernicusFM(img_size=48, patch_size=16, **SMALL).eval()
    norm, reading = own.fc_norm, reading_of("s1_asc", {"sentinel-1": ("VV", "VH")}, 3)
    x = torch.rand(2, 1, 2, 48, 48)
    dates = torch.tensor([[[1971, 2, 0]], [[2020, 10, 0]]], dtype=torch.int16)
    days, unknown = [366, 18271], math.nan
    table = torch.tensor([[5.0, 50.0, days[0], unknown], [6.0, 40.0, days[1], unknown]])
    expected = own.forward_features(x[:, 0], table, [5e7, 5e7], [1e9, 1e9])
    metadata = Metadata(dates, torch.tensor([[50.0, 5.0], [40.0, 6.0]]))
    found = torchgeo.CopernicusFm(own, None, [reading])(x, reading, metadata)[:, 0]
    torch.testing.assert_close(norm(found.mean(dim=1)), expected)


@torch.no_grad()
def test_croma_gives_the_tokens_of_its_own_forward(real_torchgeo):
    croma = importlib.import_module("torchgeo.models.croma")
    own = croma.CROMA(["sar", "optical"], 32, 2, 16, 8, 24).eval()
    model = types.SimpleNamespace()
    for sensor, channels, argument in (("s2", 12, "x_optical"), ("s1_asc", 2, "x_sar")):
        reading = reading_of(sensor, torchgeo._CROMA_READS, 3)
        x = 3 * torch.randn(2, 1, channels, 24, 24)
        other = {"x_sar": torch.zeros(2, 2, 24, 24), "x_optical": torch.zeros(2, 12, 24, 24)}
        scaled = {argument: (x[:, 0] / 4 + 0.5).clamp(0, 1)}
        expected = own(**{**other, **scaled})[argument.removeprefix("x_") + "_encodings"]
        adapter = torchgeo.Croma(copy.deepcopy(own), model, [reading])
        torch.testing.assert_close(adapter(x, reading, UNKNOWN)[:, 0], expected)


@torch.no_grad()
def test_clay_gives_the_tokens_of_its_own_forward(real_terratorch):
    modules = importlib.import_module("terratorch.models.backbones.clay_v1.modules")
    own = modules.EmbeddingEncoder(24, 8, 32, 2, 2, 16, 2.0).eval()
    backbone = nn.Module()
    backbone.clay_encoder = own
    reading = reading_of("s2", {"sentinel-2": terratorch._CLAY_BANDS}, 3)
    x = torch.rand(2, 1, 10, 24, 24)
    dates = torch.tensor([[[2020, 15, 6]], [[2020, 200, 18]]], dtype=torch.int16)
    weeks = [2 * math.pi * w / 52 for w in (3, 29)]
    time = torch.tensor(
        [[math.sin(weeks[0]), math.cos(weeks[0]), 1, 0], [math.sin(weeks[1]), math.cos(weeks[1]), -1, 0]]
    )
    cube = {"pixels": x[:, 0], "time": time, "latlon": torch.zeros(2, 4), "gsd": 2.5}
    cube["waves"] = torch.tensor([0.492, 0.56, 0.665, 0.704, 0.741, 0.783, 0.833, 0.865, 1.614, 2.202])
    expected = own(cube)[-1][:, 1:]
    found = terratorch.Clay(backbone, None, [reading])(x, reading, Metadata(dates, None))[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
