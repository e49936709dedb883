"""Fixtures of the reference model: NAME.json (configuration, losses) beside NAME.safetensors (weights, batch, masks,
outputs). Datasets, fusions and band groupings are all read from these files."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from maestro_scale.datasets.spec import Scale, Sensor, Target
from maestro_scale.interop.reference_keys import from_reference
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sizes import Size
from maestro_scale.stream.batch import Batch

PARITY_DIR = Path(os.environ.get("MAESTRO_PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))
FIXTURES = sorted(p.stem for p in PARITY_DIR.glob("*.json")) if PARITY_DIR.is_dir() else []
RELATIVE = 1e-4
LOSSES = {
    "loss_l1_norm": ("patch_group", "l1"),
    "loss_l1_patchwise": ("patch", "l1"),
    "loss_l1": ("none", "l1"),
    "loss_l2_norm": ("patch_group", "l2"),
    "loss_l2_patchwise": ("patch", "l2"),
    "loss_l2": ("none", "l2"),
}


@dataclasses.dataclass
class Fixture:
    config: ModelConfig
    path: Path
    losses: dict[str, float]

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path)

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + "/")}


def load(name: str) -> Fixture:
    meta = json.loads((PARITY_DIR / f"{name}.json").read_text())
    losses = {k: meta[k] for k in LOSSES if k in meta}
    return Fixture(model_config(meta), PARITY_DIR / f"{name}.safetensors", losses)


def sensor(name: str, info: dict) -> Sensor:
    """``bands`` is a count (one token of all bands), or a list of bands per token.

    The numbers in that list are the bands that were read from a file; the batch already has them in that order.
    """
    bands = info["bands"]
    tokens = [bands] if isinstance(bands, int) else [len(token) for token in bands]
    fields = {k: info[k] for k in ("image_size", "num_dates", "group", "embed")}
    return Sensor(
        name=name,
        source=name,
        patch=info["patch_size"],
        bands=tuple(range(sum(tokens))),
        band_groups=tuple(info["norm_bands"] or tokens),
        token_groups=tuple(tokens),
        scale=Scale(),
        elevation=info["rescale_elev"],
        **fields,
    )


def model_config(meta: dict) -> ModelConfig:
    sensors = tuple(sensor(n, i) for n, i in meta["inputs"].items())
    heads = tuple(
        Target(
            n,
            "segmentation" if t["type"] == "segment" else "multilabel",
            tuple(map(str, range(t["num_classes"]))),
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
        # As in the reference: by default the finest grid that all sensors share.
        pos_grid=meta["grid_pos_enc"] or math.lcm(*(s.grid for s in sensors)),
        fusion=meta["fusion_mode"],
        inter_depth=meta["inter_depth"],
        spectral="token",  # a sensor whose bands are one token is unaffected
        ref_sensor=meta["ref_input"],
        crop_m=meta["crop_meters"],
        heads=heads,
    )


def build(fixture: Fixture, target: str = "patch_group", loss: str = "l1") -> Maestro:
    model = Maestro(dataclasses.replace(fixture.config, target=target, loss=loss))
    segmentation = frozenset(h.name for h in fixture.config.heads if h.kind == "segmentation")
    state, missing, unused = from_reference(fixture.under("weights"), model.state_dict(), segmentation)
    assert not missing, f"the fixture lacks {missing}"
    assert not unused, f"the model has no place for {unused}"
    model.load_state_dict(state)
    return model.eval()


def batch_of(fixture: Fixture) -> Batch:
    given = fixture.under("batch")
    sensors = fixture.config.sensors
    return Batch(
        dataset="parity",
        pixels={s.name: given[s.name] for s in sensors},
        dates={s.name: given[f"{s.name}_dates"] for s in sensors},
        ref_date=given["ref_date"].flatten(0, -2),
        noise={},
        targets={},
        keys=tuple(map(str, range(len(given["ref_date"])))),
        num_repeated_dates=0,
    )


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    worst = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert worst < RELATIVE, f"differs by {worst:.2e} of the largest value"
