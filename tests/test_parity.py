"""Parity with the reference model: every fixture in MAESTRO_PARITY_DIR, within 1e-4 relative.

A fixture is NAME.json (configuration, losses) beside NAME.safetensors (weights, batch, masks, outputs). Nothing here
is tuned to the fixtures at hand: fusion, band groups, targets and datasets are read from the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maestro_scale.datasets.spec import Scale, Sensor, Target
from maestro_scale.interop.reference_keys import from_reference
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.embed import unpatchify
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import Mask, by_sensor
from maestro_scale.model.sizes import Size
from maestro_scale.model.targets import hidden_pixels
from maestro_scale.stream.batch import Batch

PARITY_DIR = Path(os.environ.get("MAESTRO_PARITY_DIR", Path(__file__).parents[2] / "shared" / "parity"))
FIXTURES = sorted(p.stem for p in PARITY_DIR.glob("*.json")) if PARITY_DIR.is_dir() else []
RELATIVE = 1e-4
LOSSES = {"loss_l1_norm": "patch_group", "loss_l1_patchwise": "patch", "loss_l1": "none"}


def test_fixtures_are_found():
    if not PARITY_DIR.is_dir():
        pytest.skip(f"no parity fixtures at {PARITY_DIR}; set MAESTRO_PARITY_DIR")
    assert FIXTURES, f"{PARITY_DIR} holds no fixture"


@dataclasses.dataclass
class Fixture:
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    losses: dict[str, float]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + "/")}


def load(name: str) -> Fixture:
    meta = json.loads((PARITY_DIR / f"{name}.json").read_text())
    tensors = load_file(PARITY_DIR / f"{name}.safetensors")
    return Fixture(model_config(meta), tensors, {k: meta[k] for k in LOSSES if k in meta})


def sensor(name: str, info: dict) -> Sensor:
    """``bands`` is a count (one token of all bands), or a list of band indices per token."""
    bands = info["bands"]
    tokens = [list(range(bands))] if isinstance(bands, int) else bands
    flat = tuple(b for token in tokens for b in token)
    fields = {k: info[k] for k in ("image_size", "num_dates", "group", "embed")}
    return Sensor(
        name=name,
        source=name,
        patch=info["patch_size"],
        bands=flat,
        band_groups=tuple(info["norm_bands"] or [len(flat)]),
        token_groups=tuple(len(t) for t in tokens),
        scale=Scale(),
        elevation=info["rescale_elev"],
        **fields,
    )


def model_config(meta: dict) -> ModelConfig:
    sensors = tuple(sensor(n, i) for n, i in meta["inputs"].items())
    kinds = {"multilabel_classif": "multilabel", "segment": "segmentation"}
    heads = tuple(
        Target(
            n,
            kinds[t["type"]],
            tuple(map(str, range(t["num_classes"]))),
            ignored=(t["missing"],),
            resolution_m=t["resolution"],
        )
        for n, t in meta["targets"].items()
    )
    m = meta["model"]
    return ModelConfig(
        sensors=sensors,
        size=Size(
            width=m["embed_dim"],
            depth=m["depth"],
            heads=m["heads"],
            dim_head=m["dim_head"],
            mlp_ratio=m["mlp_ratio"],
            decoder_depth=m["decoder_depth"],
            decoder_width=m["decoder_dim"],
            decoder_heads=m["decoder_heads"],
            decoder_dim_head=m["decoder_dim_head"],
            decoder_mlp_ratio=m["decoder_mlp_ratio"],
        ),
        pos_grid=meta["grid_pos_enc"],
        fusion=meta["fusion_mode"],
        inter_depth=meta["inter_depth"],
        spectral="token",  # a sensor whose bands are one token is unaffected
        ref_sensor=meta["ref_input"],
        heads=heads,
    )


def build(fixture: Fixture, target: str = "patch_group") -> Maestro:
    model = Maestro(dataclasses.replace(fixture.config, target=target))
    segmentation = frozenset(h.name for h in fixture.config.heads if h.kind == "segmentation")
    state, missing, unused = from_reference(fixture.under("weights"), model.state_dict(), segmentation)
    assert not missing, f"the fixture lacks {missing}"
    assert not unused, f"the model has no place for {unused}"
    model.load_state_dict(state)
    return model.eval()


def batch_of(fixture: Fixture) -> Batch:
    given = fixture.under("batch")
    sensors = fixture.config.sensors
    size = len(given["ref_date"])
    return Batch(
        dataset="parity",
        pixels={s.name: given[s.name][:, :, list(s.bands)] for s in sensors},
        dates={s.name: given[f"{s.name}_dates"] for s in sensors},
        ref_date=given["ref_date"][:, 0],
        noise={},
        targets={},
        keys=tuple(map(str, range(size))),
        filled=0,
    )


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    worst = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert worst < RELATIVE, f"differs by {worst:.2e} of the largest value"


@pytest.mark.parametrize("name", FIXTURES)
def test_reconstruction(name):
    fixture = load(name)
    model, batch = build(fixture), batch_of(fixture)
    masks = {k: Mask.of(v) for k, v in fixture.under("mask").items()}
    with torch.no_grad():
        patches = model.reconstruct(batch, masks)
    for s in fixture.config.sensors:
        close(unpatchify(patches[s.name], s.patch), fixture.tensors[f"pixels/{s.name}"])


@pytest.mark.parametrize("name", FIXTURES)
def test_logits(name):
    fixture = load(name)
    with torch.no_grad():
        logits = build(fixture).predict(batch_of(fixture))
    for target, theirs in fixture.under("logits").items():
        close(logits[target], theirs.reshape(logits[target].shape))


@pytest.mark.parametrize("which", LOSSES)
@pytest.mark.parametrize("name", FIXTURES)
def test_loss(name, which):
    fixture = load(name)
    if which not in fixture.losses:
        pytest.skip(f"{name} does not state {which}")
    model = build(fixture, LOSSES[which])
    masks = {k: Mask.of(v) for k, v in fixture.under("mask").items()}
    hidden = by_sensor(model.config, masks)
    counts = torch.stack([hidden_pixels(model.config, s, hidden[s.name]) for s in fixture.config.sensors])
    with torch.no_grad():
        loss, _ = model(batch_of(fixture), masks, counts)
    assert loss.item() == pytest.approx(fixture.losses[which], rel=RELATIVE)
