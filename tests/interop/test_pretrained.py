"""Models loaded from a folder, an object store or the hub embed tiles and batches of any sensors and dates."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch
from testkit.models import full_batch, small_config

from maestro_scale import load_model
from maestro_scale.datasets.spec import DatasetError, Target, Tile
from maestro_scale.interop.export import CONFIG, WEIGHTS, ExportError, write_model
from maestro_scale.model.config import DatasetView
from maestro_scale.model.maestro import Maestro
from maestro_scale.output_folder import OutputError


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    model = Maestro(small_config(norm="token", dataset="test", crop_m=60.0)).initialise(0)
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_model(folder, model.state_dict(), model.config, {"step": 7})
    return folder


@pytest.fixture
def model(exported) -> Maestro:
    return load_model(exported)


def test_an_export_over_another_model_never_mixes_both(exported, model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_model(folder, model.state_dict(), model.config, {"step": 7})

    replace = os.replace

    def die_after_the_weights(source, target):
        if Path(target).name == CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_after_the_weights)
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        write_model(folder, other, model.config, {"step": 9})
    with pytest.raises(ExportError):
        load_model(folder)


def test_a_model_is_not_written_among_shards(model, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(
        OutputError, match="contains shards of a dataset: choose another folder for the output"
    ):
        write_model(tmp_path, model.state_dict(), model.config, {"step": 7})
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def agrees(loaded: Maestro, expected: Maestro) -> bool:
    ours = loaded.state_dict()
    return loaded.config == expected.config and all(
        torch.equal(ours[k], v) for k, v in expected.state_dict().items()
    )


# -- sources of models -------------------------------------------------------------------------------------------------


def test_a_model_loads_from_an_object_store(exported, model, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = s3fs.S3FileSystem()
        fs.mkdir("models")
        for name in (CONFIG, WEIGHTS):
            fs.put(str(exported / name), f"models/run/{name}")
        assert agrees(load_model("s3://models/run"), model)
        assert agrees(load_model("s3://models/run/"), model)
        with pytest.raises(ExportError, match="s3://models/other is not an exported model"):
            load_model("s3://models/other")
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_the_hub_needs_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ExportError, match=r"maestro-scale\[hub\]"):
        load_model("hf://owner/name")


class Hub(BaseHTTPRequestHandler):
    """The responses of the Hugging Face hub that downloading files needs."""

    folder: Path
    commit = "0" * 40

    def do_GET(self) -> None:
        self.do_HEAD(body=True)

    def do_HEAD(self, body: bool = False) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:5] != ["owner", "name", "resolve", "v1", "base"]:
            self.send_error(404)
            return
        content = (self.folder / parts[5]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def test_a_model_loads_from_the_hub(exported, model, tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the hub extra")
    handler = type("Handler", (Hub,), {"folder": exported})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = (
            "from maestro_scale import load_model\n"
            "from maestro_scale.interop.export import ExportError\n"
            "m = load_model('hf://owner/name@v1/base')\n"
            "print(float(sum(p.double().sum() for p in m.parameters())))\n"
            "try: load_model('hf://owner/other')\n"
            "except ExportError as error: print(error)\n"
        )
        # The client reads its endpoint on import.
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    total, error = done.stdout.splitlines()
    assert float(total) == pytest.approx(float(sum(p.detach().double().sum() for p in model.parameters())))
    assert error.startswith("hf://owner/other: cannot be fetched (")


def test_loading_imports_nothing_of_the_training_stack(exported):
    program = (
        f"import sys; from maestro_scale import load_model; load_model({str(exported)!r});"
        "print([m for m in ('deepspeed', 'mlflow', 'pydantic', 'webdataset', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "is not an exported model"),
        (lambda f: (f / CONFIG).write_text("{"), "is not an exported model"),
        (lambda f: (f / CONFIG).write_text('{"format_version": 9}'), "format 9"),
        (lambda f: (f / CONFIG).write_text('{"format_version": 1, "model": {}}'), "describes no model"),
        (lambda f: (f / WEIGHTS).write_bytes(b"cut"), "cannot be read"),
        (lambda f: (f / WEIGHTS).unlink(), "cannot be read"),
    ],
)
def test_invalid_models_are_refused(exported, tmp_path, damage, message):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(ExportError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["sensors", "heads", "others"])
def test_a_model_with_too_many_parts_is_refused_before_it_is_built(model, name):
    view, head = DatasetView("a", model.config.sensors, 4), Target("a", "multilabel", ("b",))
    item = {"sensors": model.config.sensors[0], "heads": head, "others": view}
    with pytest.raises(ValueError, match=rf"{name}: has 1001 entries; at most 1000 are supported"):
        dataclasses.replace(model.config, **{name: (item[name],) * 1001})


# -- embedding ---------------------------------------------------------------------------------------------------------


def without(batch, *names):
    return dataclasses.replace(
        batch,
        pixels={k: v for k, v in batch.pixels.items() if k not in names},
        dates={k: v for k, v in batch.dates.items() if k not in names},
    )


@torch.no_grad()
def test_a_subset_of_sensors_embeds(model):
    batch = full_batch(model.config, 2)
    whole = model.embed(batch)
    width = model.config.size.width
    assert whole.vector.shape == (2, 4 * width)
    part = model.embed(without(batch, "aerial", "s1_des"))
    assert list(part.tokens) == ["s2", "s1_asc"]
    assert part.vector.shape == (2, 2 * width)
    assert not torch.allclose(part.tokens["s2"], whole.tokens["s2"]), "groups attend to each other"
    assert part.vector.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("num_dates", [1, 3, 11])
def test_any_number_of_dates_embeds(model, num_dates):
    batch = full_batch(model.config, 2)
    more = torch.cat([batch.pixels["s2"]] * 3, dim=1)[:, :num_dates]
    days = torch.cat([batch.dates["s2"]] * 3, dim=1)[:, :num_dates]
    batch = dataclasses.replace(batch, pixels=batch.pixels | {"s2": more}, dates=batch.dates | {"s2": days})
    tokens = model.embed(batch).tokens["s2"]
    assert tokens.shape == (2, num_dates, 9, model.config.size.width)


@torch.no_grad()
def test_dates_in_another_order_give_the_same_tokens_in_that_order(model):
    batch = full_batch(model.config, 1)
    order = torch.tensor([2, 0, 3, 1])
    turned = dataclasses.replace(
        batch,
        pixels=batch.pixels | {"s2": batch.pixels["s2"][:, order]},
        dates=batch.dates | {"s2": batch.dates["s2"][:, order]},
    )
    expected = model.embed(batch).tokens["s2"][:, order]
    assert torch.allclose(model.embed(turned).tokens["s2"], expected, atol=1e-5)


@torch.no_grad()
def test_a_larger_crop_has_more_tokens(model):
    batch = full_batch(model.config, 1)
    twice = dataclasses.replace(batch, pixels={k: v.repeat(1, 1, 1, 2, 2) for k, v in batch.pixels.items()})
    embedding = model.embed(twice, crop_m=120.0)
    assert embedding.tokens["s2"].shape[2] == 36
    assert embedding.tokens["aerial"].shape[2] == 64
    # The same images given as one crop of the usual extent are resized to it.
    assert model.embed(twice).tokens["s2"].shape[2] == 9
    with pytest.raises(ValueError, match="use a multiple of 60 m"):
        model.embed(twice, crop_m=90.0)


@torch.no_grad()
def test_a_tile_embeds_like_the_same_batch(model):
    batch = full_batch(model.config, 1)
    kept = without(batch, "s1_asc")
    tile = Tile(
        key="here",
        arrays={k: v[0].numpy() for k, v in kept.pixels.items()},
        dates={k: v[0].numpy() for k, v in kept.dates.items()},
        masks={},
        targets={},
        ref_date=batch.ref_date[0].numpy(),
    )
    assert torch.equal(model.embed(tile).vector, model.embed(kept).vector)
    wide = {
        k: np.pad(a, ((0, 0), (0, 0), (a.shape[2] // 2,) * 2, (a.shape[3] // 2,) * 2))
        for k, a in tile.arrays.items()
    }
    middle = model.embed(dataclasses.replace(tile, arrays=wide), tile_m=120.0)
    assert torch.equal(middle.vector, model.embed(kept).vector)
    with pytest.raises(DatasetError, match="here: has other, the model reads aerial"):
        model.embed(dataclasses.replace(tile, arrays={"other": tile.arrays["s2"]}))


def test_unknown_inputs_are_named(model):
    batch = full_batch(model.config, 1)
    landsat = dataclasses.replace(batch, pixels={"landsat": batch.pixels["s2"]})
    with pytest.raises(ValueError, match="has no sensor 'landsat'; it has: aerial, s2"):
        model.embed(landsat)
    with pytest.raises(ValueError, match="sensor s2: 3 bands were given, the model has 10"):
        model.embed(dataclasses.replace(batch, pixels={"s2": batch.pixels["s2"][:, :, :3]}))
    with pytest.raises(ValueError, match="was given no sensor"):
        model.embed(dataclasses.replace(batch, pixels={}))
