"""External encoders: the table of names, the protocol, physical units, coordinates, and all modes with a plugin."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maestro_scale.datasets.flair_hub.reader import FULL_SPEC as FLAIR
from maestro_scale.datasets.pastis_hd.reader import SPEC as PASTIS
from maestro_scale.datasets.treesatai_ts.reader import SPEC as TREESAT
from maestro_scale.evaluate import parse
from maestro_scale.evaluation.baselines import coordinates
from maestro_scale.evaluation.baselines.content import content_digest
from maestro_scale.evaluation.baselines.inputs import PhysicalUnits, sensor_inputs
from maestro_scale.evaluation.baselines.protocol import Images, parse_options
from maestro_scale.evaluation.baselines.registry import BASELINES, build_baseline, short_name
from maestro_scale.evaluation.benchmark import Benchmark
from maestro_scale.evaluation.encoder import Encoder
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.evaluation.finetune.predictor import build_predictor
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.recipe import load_recipe
from maestro_scale.stream.batch import Batch
from tests.evaluation import external_encoders
from tests.evaluation.conftest import FIELDS
from tests.evaluation.test_baselines import batch as pixels_of
from tests.evaluation.test_finetune import evaluated, losses

HERE = "python:tests.evaluation.external_encoders"


def batch() -> Batch:
    dates = {s.name: torch.tensor([2020, 40, 10]).expand(2, s.num_dates, 3) for s in FIELDS.sensors}
    return dataclasses.replace(pixels_of(), dates=dates)


def plugin(name="PixelMeans", options=""):
    return build_baseline(f"{HERE}:{name}{options}", None, FIELDS)


def test_errors_name_the_nearest_baseline_and_what_is_missing():
    for name, message in {
        "presta:x": "no baseline is called 'presta:x' .did you mean 'presto'..; there are: statistics, untrained",
        "presto": "--baseline presto: write presto:WEIGHTS",
        "statistics:x": "--baseline statistics:x: write statistics$",
        "python:nodots": "write python:pkg.module:Class",
        "python:tests.nowhere:X": "tests.nowhere cannot be imported .*PYTHONPATH",
        f"{HERE}:PixelMean": "has no class PixelMean .did you mean 'PixelMeans'..",
        f"{HERE}:NoModule": "NoModule is not a torch.nn.Module",
        "python:os:system": "python:os:system: system is not a torch.nn.Module",
        f"{HERE}:Wrong,returns=nothing": r"tokens\(\) returned dict: return a dict of sensors",
        f"{HERE}:Wrong,returns=sensor": "the key 'aeral', which is not a sensor .did you mean 'aerial'..",
        f"{HERE}:Wrong,returns=axes": r"\(2, 4, 3\) for aerial, where \(B, R, L, E\) is expected",
        f"{HERE}:Wrong,returns=width": r"\(2, 1, 4, 5\) for aerial, where \(2, R, L, 3\) is expected",
        f"{HERE}:Wrong,returns=grid": "5 tokens for aerial, which are not a square grid",
        f"{HERE}:Wrong,returns=integers": "Wrong: .* torch.int32 for aerial: convert it to real floating-point",
        f"{HERE}:Wrong,returns=complex": "Wrong: .* torch.complex64 for vector: convert it to real floating-point",
    }.items():
        with pytest.raises(EvaluationError, match=message) as caught:
            build_baseline(name, None, FIELDS)
        assert "\n" not in str(caught.value)
    bandless = dataclasses.replace(
        FIELDS,
        modalities=(dataclasses.replace(FIELDS.modalities[0], bands=("X", "G", "B")), FIELDS.modalities[1]),
    )
    with pytest.raises(
        EvaluationError, match=r"Vector: sensor aerial has no band 'R' \(there are: B, G, X\)"
    ):
        build_baseline(f"{HERE}:Vector", None, bandless)


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (
            "cells",
            r"s2 \(R = 2, L = 4\), where the check .* had s2 \(R = 2, L = 1\): return the same sensors",
        ),
        ("rows", r"s2 \(R = 1, L = 1\), where the check .* had s2 \(R = 2, L = 1\): return the same sensors"),
        ("sensors", r"aerial \(R = 2, L = 1\), s2 \(R = 2, L = 1\), where the check .* had s2 \("),
        ("integers", "torch.int32 for s2: convert it"),
    ],
)
def test_tokens_of_the_data_are_like_those_of_the_check(fields, tmp_path, returns, message):
    encoder = plugin("Uneven", f",returns={returns}")
    benchmark = Benchmark(FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features")
    with pytest.raises(EvaluationError, match=rf"^{HERE}:Uneven: tokens\(\) returned {message}") as caught:
        evaluate_frozen(encoder, benchmark, ["attentive"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('boom\\nbang')", "RuntimeError: boom"),
        ("def (", r"SyntaxError: invalid syntax \(__init__.py, line 1\)"),
        ("raise SystemError", "SystemError"),
    ],
)
def test_a_package_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, source, reason):
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    (package / "encoder.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    name = "python:broken_package.encoder:Encoder"
    assert content_digest(name) == ""  # a study asks before it builds anything
    message = (
        rf"^--baseline {name}: broken_package.encoder cannot be imported \({reason}\); correct the module"
    )
    with pytest.raises(EvaluationError, match=message) as caught:
        build_baseline(name, None, FIELDS)
    assert "\n" not in str(caught.value)


def test_every_name_is_in_the_help_and_in_the_documentation(capsys, pytestconfig):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    page = (pytestconfig.rootpath / "docs" / "evaluation.md").read_text()
    for name, kind in BASELINES.items():
        assert name in shown, name
        assert f"`{name}:{kind.argument}`" in page if kind.argument else f"`{name}`" in page, name


def test_options_follow_the_argument():
    assert parse_options("/a,b/c.pt,dates=steps,x=1=2") == ("/a,b/c.pt", {"dates": "steps", "x": "1=2"})
    assert short_name("presto:/data/default_model.pt,dates=steps") == "presto:default_model.pt,dates=steps"
    assert short_name("image:facebook/dinov2-base") == "dinov2-base"


def test_sensors_are_described_by_the_names_of_their_bands():
    found = {(s.name, name): v for s in (TREESAT, PASTIS, FLAIR) for name, v in sensor_inputs(s).items()}
    assert {name: v.instrument for (spec, name), v in found.items() if spec == "flair_hub"} == {
        "aerial": "image",
        "dem": "elevation",
        "s2": "sentinel-2",
        "s1_asc": "sentinel-1",
        "s1_des": "sentinel-1",
        "spot": "image",
        "aerial_rlt": "image",
    }
    s2 = found["treesatai_ts", "s2"]
    assert (s2.bands[0], s2.wavelengths_nm[0], s2.units[0]) == ("B2", 492.0, "reflectance")
    assert (s2.resolution_m, s2.size, s2.grid, s2.num_dates) == (10.0, 6, 3, 16)
    assert found["treesatai_ts", "aerial"].units == ("brightness",) * 4
    assert found["treesatai_ts", "aerial"].wavelengths_nm == (830.0, 660.0, 560.0, 485.0)
    assert found["pastis_hd", "s1_asc"].units == ("dB", "dB")
    assert found["pastis_hd", "s1_asc"].wavelengths_nm == (None, None)
    assert found["flair_hub", "dem"].units == ("m", "m")


def images_of(spec, pixels):
    return PhysicalUnits(spec).convert(
        Batch(spec.name, pixels, {}, torch.zeros(1, 3), {}, {}, ("a",)), torch.zeros(1, 2)
    )


def test_pixels_arrive_in_physical_units():
    raw = {"s1_asc": (100.0, 20.0), "s2": (2500, 0.25), "aerial": (51, 0.2), "dem": (312.5, 312.5)}
    flair = FLAIR.select([*raw])
    pixels = {
        s.name: torch.full((1, s.num_dates, len(s.bands), 16, 16), raw[s.name][0]) for s in flair.sensors
    }
    images = images_of(flair, pixels)
    for name, (_, expected) in raw.items():
        assert images.pixels[name].unique().item() == pytest.approx(expected), name
        assert images.pixels[name].shape[-1] == flair.sensor(name).image_size
    decibels = PASTIS.select(["s1_asc"])
    pixels = {"s1_asc": torch.full((1, 4, 2, 16, 16), -12.5)}
    images = images_of(decibels, pixels)
    assert images.pixels["s1_asc"].unique().item() == -12.5


def test_months_are_those_of_the_calendar():
    days = [(2020, 1), (2020, 31), (2020, 60), (2020, 61), (2019, 59), (2019, 60), (2020, 366), (2019, 365)]
    dates = torch.tensor([[(year, day, 0) for year, day in days]], dtype=torch.int16)
    months = Images({}, {"s2": dates}, torch.zeros(1, 2)).months("s2")
    assert months.tolist() == [[0, 0, 1, 2, 1, 2, 11, 11]]


@pytest.mark.parametrize(
    ("crs", "east", "north", "expected"),
    [  # by PROJ
        ("EPSG:2154", 652000.0, 6862000.0, (48.8562481, 2.3458120)),
        ("EPSG:32631", 450000.0, 5400000.0, (48.7510055, 2.3197853)),
        ("EPSG:32733", 300000.0, 6200000.0, (-34.3220051, 12.8262292)),
        ("EPSG:25832", 560000.0, 5760000.0, (51.9874246, 9.8737549)),
    ],
)
def test_coordinates_are_those_of_proj(crs, east, north, expected):
    assert coordinates.to_degrees(crs, east, north) == pytest.approx(expected, abs=1e-7)


def test_a_batch_knows_where_its_tiles_are():
    place = json.dumps({"crs": "EPSG:32631", "west_m": 449970.0, "north_m": 5400030.0})
    degrees = json.dumps({"crs": "EPSG:4326", "west_m": -110.5, "north_m": 43.5})
    placed = dataclasses.replace(batch(), places=(place, None))
    found = coordinates.latlon(placed, 60.0, torch.device("cpu"))
    np.testing.assert_allclose(found[0], [48.7510055, 2.3197853], atol=1e-5)
    assert found[1].isnan().all()
    assert coordinates.to_degrees("EPSG:3857", 0.0, 0.0) is None
    assert coordinates.latlon(dataclasses.replace(placed, places=(degrees, None)), 60.0, torch.device("cpu"))[
        0
    ].tolist() == [43.5, -110.5]


def test_the_key_of_features_has_name_options_and_weights():
    one = plugin(options=",seed=1")
    digests = {
        "same": weights_digest(plugin(options=",seed=1")),
        "seed": weights_digest(plugin(options=",seed=2")),
        "option": weights_digest(plugin(options=",seed=1,note=x")),
    }
    assert digests["same"] == weights_digest(one)
    assert len({*digests.values()}) == 3
    assert one.adaptation == "bands by a linear map per sensor, dates one by one"


def test_features_of_an_edited_module_are_encoded_again(fields, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = """
import torch
from torch import nn

class Encoder(nn.Module):
    width, adaptation = 1, "none"

    def __init__(self, sensors, options):
        super().__init__()

    def tokens(self, images):
        return {"s2": images.pixels["s2"].mean((2, 3, 4))[:, :, None, None] * FACTOR}
"""
    benchmark = Benchmark(FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features")

    def stored(factor: str) -> np.ndarray:
        (tmp_path / "edited_encoder.py").write_text(source.replace("FACTOR", factor))
        sys.modules.pop("edited_encoder", None)
        importlib.invalidate_caches()
        evaluate_frozen(build_baseline("python:edited_encoder:Encoder", None, FIELDS), benchmark, ["knn"])
        (folder,) = (tmp_path / "features").glob("test-*")
        return np.load(folder / "features.npy").astype(np.float64)

    one = stored("1")
    np.testing.assert_allclose(stored("100"), 100 * one, rtol=1e-2)


def test_results_record_the_content_of_an_encoder(fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(fields.recipe(tmp_path))

    def recorded(name: str) -> str:
        return Encoder(recipe, None, name, None).weights

    plain = recorded(f"{HERE}:PixelMeans")
    assert len(plain) == 64
    (tmp_path / "w.pt").write_text("1")
    with_file = recorded(f"{HERE}:PixelMeans,note=w.pt")
    (tmp_path / "w.pt").write_text("2")
    assert len({plain, with_file, recorded(f"{HERE}:PixelMeans,note=w.pt")}) == 3
    assert recorded("statistics") == ""


def test_the_content_of_an_encoder_includes_folders_of_its_options(tmp_path):
    folder = tmp_path / "weights"
    (folder / "deep").mkdir(parents=True)
    name = f"{HERE}:PixelMeans,note={folder}"
    module = Path(external_encoders.__file__)
    empty, found = content_digest(name), []
    for file, content in (("a.bin", "1"), ("a.bin", "2"), ("deep/b.bin", "1")):
        (folder / file).write_text(content)
        found.append((content_digest(name), build_baseline(name, None, FIELDS).code))
    assert len({empty, *(digest for digest, _ in found)}) == 4
    assert all(digest == code for digest, code in found), "cached features depend on the folder too"
    # By hand: a line per file with its name and digest.
    lines = [
        f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in (module, folder / "a.bin", folder / "deep" / "b.bin")
    ]
    assert found[-1][0] == hashlib.sha256("".join(lines).encode()).hexdigest()
    of_file = hashlib.sha256("".join(lines[:2]).encode()).hexdigest()
    assert content_digest(f"{HERE}:PixelMeans,note={folder / 'a.bin'}") == of_file


def test_a_vector_is_one_token():
    encoder = plugin("Vector")
    embedding = encoder.embed(batch())
    assert embedding.vector.shape == (2, 3)
    np.testing.assert_allclose(
        embedding.vector, batch().pixels["aerial"].float().mean((1, 3, 4)) / 255, rtol=1e-5
    )
    assert {k: tuple(v.shape) for k, v in embedding.tokens.items()} == {"vector": (2, 1, 1, 3)}
    with pytest.raises(EvaluationError, match="no parameter of the encoder can be trained: use --mode knn"):
        encoder.check_trainable(["finetune"])


def test_training_freezes_what_tokens_do_not_depend_on_and_draws_no_random_numbers():
    objective = target_loss_for(task_for(FIELDS))
    tuned, scratch, again = (
        build_predictor(plugin(), "fields", objective, 5, pretrained).train()
        for pretrained in (True, False, False)
    )
    assert [n for n, _ in tuned.named_buffers()] == [
        "encoder.encoder.unused.weight",
        "encoder.encoder.unused.bias",
    ]
    assert all(p.requires_grad for p in tuned.parameters())
    with torch.no_grad():
        assert torch.equal(tuned.logits(batch()), tuned.logits(batch())), "dropout was active"
    name = "encoder.encoder.maps.s2.weight"
    assert torch.equal(tuned.state_dict()[name], plugin().state_dict()[name.removeprefix("encoder.")])
    assert torch.equal(scratch.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(scratch.state_dict()[name], tuned.state_dict()[name])
    tuned.logits(batch()).square().sum().backward()
    assert [n for n, p in tuned.named_parameters() if p.grad is None] == []


def test_frozen_modes_score_a_plugin(fields, tmp_path, monkeypatch):
    from maestro_scale.evaluation.probes import lr_grid

    monkeypatch.setattr(lr_grid, "MIN_STEPS", 20)
    benchmark = Benchmark(FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features")
    results = {r.mode: r for r in evaluate_frozen(plugin(), benchmark, ["knn", "probe", "attentive"])}
    assert results["probe"].value > 0.8
    assert results["knn"].value > 0.8
    assert results["attentive"].value > 0.3
    (vector,) = evaluate_frozen(plugin("Vector"), benchmark, ["probe"])
    assert 0 < vector.value < results["probe"].value, "a vector per crop cannot show where the fields are"


def test_the_example_of_the_documentation_runs(pytestconfig, fields, tmp_path, monkeypatch):
    page = (pytestconfig.rootpath / "docs" / "evaluation.md").read_text()
    (tmp_path / "my_encoder.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    encoder = build_baseline("python:my_encoder:CellEncoder,width=32", None, FIELDS)
    assert encoder.adaptation == "B2 B3 as reflectance, means of cells, every date by itself"
    assert {k: tuple(v.shape) for k, v in encoder.encode(batch()).items()} == {"s2": (2, 2, 16, 32)}
    benchmark = Benchmark(FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features")
    (result,) = evaluate_frozen(encoder, benchmark, ["knn"])
    assert result.value > 0.5
    encoder.check_trainable(["finetune", "scratch"])


@pytest.mark.slow
def test_two_ranks_finetune_a_plugin_and_score_it_as_one_does(fields, tmp_path, monkeypatch, pytestconfig):
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))  # the ranks import the encoder from tests/
    args = [f"--baseline={HERE}:PixelMeans", "--mode=finetune", "--mode=knn"]
    out = tmp_path / "out"
    evaluated(fields, tmp_path, out, *args, ranks=2, course=["train.steps=4"])
    assert losses(out / "finetune")[-1] < losses(out / "finetune")[0]
    result = EvalResult.load(out / "knn" / "results.json")
    assert result.adaptation == "bands by a linear map per sensor, dates one by one"
    benchmark = Benchmark(FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features")
    (alone,) = evaluate_frozen(plugin(), benchmark, ["knn"])
    assert alone.value == result.value
    assert alone.confusion == result.confusion
