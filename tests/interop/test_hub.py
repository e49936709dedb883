"""Published models by name: a checkpoint in the authors' format is fetched, converted and cached in one call."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from testkit.hub_server import hub_server
from typer.testing import CliRunner

from maestro_scale import backbone, datasets, load_model
from maestro_scale.cli import app
from maestro_scale.evaluation.features.load_encoder import load_encoder
from maestro_scale.interop import hub
from maestro_scale.interop.convert_back import convert_to_reference
from maestro_scale.interop.export import CONFIG, WEIGHTS, ExportError, write_model
from maestro_scale.interop.published import PUBLISHED
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sizes import SIZES

KNOWN = PUBLISHED["maestro-flair-hub-base"]
# A size of theirs, but for channels: its name goes by all numbers.
SIZE = dataclasses.replace(SIZES["tiny"], width=48, heads=2, dim_head=12, decoder_width=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", SIZE)


@pytest.fixture(scope="module")
def flair() -> Maestro:
    """A small model for sensors of FLAIR-HUB."""
    spec = datasets.full_spec("flair_hub")
    sensors = tuple(s for s in spec.sensors if s.name in ("dem", "s2"))
    view = {"crop_m": spec.crop_m, "dataset": spec.name}
    return Maestro(ModelConfig(sensors, SIZE, spec.pos_grid, inter_depth=1, **view)).initialise(0)


@pytest.fixture(scope="module")
def ours(flair, tmp_path_factory) -> bytes:
    """The model in the authors' format, with our configuration."""
    folder = tmp_path_factory.mktemp("theirs")
    write_model(folder / "ours", flair.state_dict(), flair.config, {"step": 5})
    convert_to_reference(folder / "ours", folder / "a.ckpt")
    return (folder / "a.ckpt").read_bytes()


@pytest.fixture(scope="module")
def theirs(ours) -> bytes:
    """The same as their code writes it: the sizes are read from the file, and the sensors from the preset."""
    content = torch.load(io.BytesIO(ours), weights_only=False)
    del content["maestro_scale"]
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server(monkeypatch, tmp_path / "home") as found:
        yield found


def equal(found: Maestro, expected: Maestro) -> bool:
    state = found.state_dict()
    return all(torch.equal(state[k], v) for k, v in expected.state_dict().items())


def downloads(server) -> list[str]:
    return [r for r in server.requests if r.startswith("GET") and "/resolve/" in r]


def test_a_published_model_is_fetched_and_converted_once(server, flair, theirs, tmp_path, capfd):
    server.add(KNOWN.repository, {KNOWN.checkpoint: theirs, "README.md": b"card", "other/last.ckpt": b""})
    assert equal(load_model(KNOWN.name), flair)
    assert len(downloads(server)) == 1
    assert equal(load_model(KNOWN.address), flair)
    assert load_encoder(hub.Path(KNOWN.address))[1] == 5, "as a path, in which the slashes are joined"
    assert backbone(KNOWN.name).out_channels
    assert len(downloads(server)) == 1
    (folder,) = (tmp_path / "home" / "maestro-scale").iterdir()
    assert sorted(p.name for p in next(folder.iterdir()).iterdir()) == [CONFIG, WEIGHTS]
    assert "using the copy" not in capfd.readouterr().err
    server.repositories.clear()  # not found
    assert equal(load_model(KNOWN.name), flair)
    (line,) = [text for text in capfd.readouterr().err.splitlines() if "using the copy in" in text]
    assert line.startswith(f"{KNOWN.address}: cannot be fetched (404")


def test_a_replaced_checkpoint_is_converted_again(server, flair, theirs):
    server.add(KNOWN.repository, {KNOWN.checkpoint: theirs})
    load_model(KNOWN.name)
    content = torch.load(io.BytesIO(theirs), weights_only=False)
    content["state_dict"] = {name: tensor + 1 for name, tensor in content["state_dict"].items()}
    replaced = io.BytesIO()
    torch.save(content, replaced)
    server.add(KNOWN.repository, {KNOWN.checkpoint: replaced.getvalue()})
    other = load_model(KNOWN.name).state_dict()
    assert all(torch.equal(other[k], v + 1) for k, v in flair.state_dict().items())


def test_any_repository_with_one_checkpoint_loads(server, flair, ours):
    server.add("me/theirs", {"runs/a.ckpt": ours})
    assert equal(load_model("hf://me/theirs"), flair)
    assert equal(load_model("hf://me/theirs/runs"), flair)
    server.add("me/theirs", {"runs/b.ckpt": ours}, "main")
    with pytest.raises(ExportError, match=r"2 checkpoints \('runs/a\.ckpt', 'runs/b\.ckpt'\): name one"):
        load_model("hf://me/theirs")
    assert equal(load_model("hf://me/theirs/runs/b.ckpt"), flair)


def test_bounds_and_errors(server, ours, monkeypatch, tmp_path):
    server.add("me/none", {"README.md": b"", "model.bin": b""})
    with pytest.raises(
        ExportError, match=r"has neither model\.safetensors with config\.json, nor a checkpoint"
    ):
        load_model("hf://me/none")
    with pytest.raises(ExportError, match=r"hf://me/gone: cannot be fetched \("):
        load_model("hf://me/gone")
    server.add("me/broken", {"a.ckpt": ours[:2000]})
    with pytest.raises(ExportError, match=r"hf://me/broken/a\.ckpt: .* cannot be read as a checkpoint"):
        load_model("hf://me/broken")
    assert not list((tmp_path / "home").rglob(CONFIG))
    server.add("me/large", {"a.ckpt": ours})
    monkeypatch.setattr(hub, "MAX_CHECKPOINT_BYTES", 1000)
    with pytest.raises(ExportError, match=r"at most 1000 are supported"):
        load_model("hf://me/large")
    with pytest.raises(ExportError, match=r"did you mean 'maestro-flair-hub-base'\?"):
        load_model("maestro-flair-base")
    for address in ("hf://me", "hf://me/../x", "hf://me//x"):
        with pytest.raises(ExportError, match="write hf://owner/name"):
            load_model(address)


def test_models_are_listed_and_described(server, flair, tmp_path):
    listed = CliRunner().invoke(app, ["models"])
    assert listed.exit_code == 0, listed.output
    for text in (KNOWN.name, KNOWN.address, "aerial", "s2", "base", "apache-2.0", "see its model card"):
        assert text in listed.output
    write_model(tmp_path / "ours", flair.state_dict(), flair.config, {"step": 5})
    server.add("me/ours", {n: (tmp_path / "ours" / n).read_bytes() for n in (CONFIG, WEIGHTS)})
    described = CliRunner().invoke(app, ["models", "hf://me/ours"])
    assert described.exit_code == 0, described.output
    for text in ("dem", "s2", "flair_hub", f"{sum(p.numel() for p in flair.parameters()):,}"):
        assert text in described.output
