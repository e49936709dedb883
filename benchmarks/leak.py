"""How much information on masked pixels reaches the encoder with ``norm: group``, the reference's patch normalisation.

    python benchmarks/leak.py

The masked patches of synthetic TreeSatAI-TS tiles are replaced by those of another tile; visible tokens should not
change. With ``norm: token`` they are bitwise unchanged. Prints the relative change (root mean square) of the visible
tokens at the input and output of the encoder, for a model of size ``tiny`` at initialisation, and writes
benchmarks/results/leak.json.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from maestro_scale import datasets
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.embed import network_input, patchify, unpatchify
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks, masks_by_sensor
from maestro_scale.model.sizes import SIZES
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source


def synthetic_batch(folder: Path, count: int) -> Batch:
    """A training batch of synthetic tiles."""
    datasets.synth("treesatai_ts", folder / "raw", 2 * count, 0)
    raw = datasets.open_raw("treesatai_ts", folder / "raw", "train")
    write_shards(raw, str(folder / "shards"), "train")
    manifest = Manifest.load(str(folder / "shards"))
    store = Store(str(folder / "shards"), folder / "cache", 2**30)
    spec = manifest.spec
    source = Source(spec, manifest.shards_of(["train"]), store)
    loader = TrainLoader([source], 0, lanes=1, global_batch=count, micro_batch=count)
    (batch,) = next(loader.steps(0, 1)).batches
    loader.close()
    return batch


def replace_masked_patches(config: ModelConfig, batch: Batch, hidden: dict[str, Tensor]) -> Batch:
    """The batch with its masked patches replaced by those of the next tile."""
    pixels = {}
    for s in config.sensors:
        size = batch.pixels[s.name].shape[-1]
        patch = s.patch * size // s.image_size  # of stored pixels
        patches = patchify(batch.pixels[s.name], patch)
        where = hidden[s.name].view(*patches.shape[:3], 1, 1)
        pixels[s.name] = unpatchify(torch.where(where, patches.roll(1, 0), patches), patch)
    return replace(batch, pixels=pixels)


def change(before: Tensor, after: Tensor) -> float:
    """Root mean square of the difference, relative to that of the values."""
    return ((after - before).pow(2).mean() / before.pow(2).mean()).sqrt().item()


@torch.no_grad()
def main() -> None:
    """Entry point."""
    spec = datasets.spec("treesatai_ts")
    with tempfile.TemporaryDirectory() as folder:
        batch = synthetic_batch(Path(folder), 16)
    found = {}
    for norm in ("group", "token"):
        config = ModelConfig(
            dataset=spec.name, sensors=spec.sensors, pos_grid=spec.pos_grid, size=SIZES["tiny"], norm=norm
        )
        model = Maestro(config).initialise(0).eval()
        masks = draw_masks(config, MaskingConfig(), batch)
        other = replace_masked_patches(config, batch, masks_by_sensor(config, masks))
        entering = {}
        for s in config.sensors:
            visible = ~masks_by_sensor(config, masks)[s.name]
            embed = next(model.patch_embed[s.embed].children())  # the only group of tokens
            before, after = (
                embed(patchify(network_input(s, b.pixels[s.name]), s.patch)).flatten(1, 2)[visible.flatten(1)]
                for b in (batch, other)
            )
            entering[s.name] = change(before, after)
        before, after = model.encode(batch, masks), model.encode(other, masks)
        found[norm] = {
            "entering": entering,
            "leaving": {name: change(before[name], after[name]) for name in before},
        }
        print(norm, json.dumps(found[norm], indent=1))
    path = Path(__file__).parent / "results" / "leak.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
