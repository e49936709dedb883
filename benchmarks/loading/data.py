"""The samples that all loaders read: synthetic tiles as files, as our shards, and one safetensors file per sample."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from benchmarks.loading.prepare import Layout, SensorLayout, TargetLayout
from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.shards.format.codec import encode_fields
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.shards.format.fields import target_field, target_layout
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.stream.crops import CropGrid
from maestro_scale.stream.packing import Field
from maestro_scale.stream.transform import Transform

TILES = {"treesatai_ts": 200, "pastis_hd": 12, "flair_hub": 40}
BATCH = {"treesatai_ts": 16, "pastis_hd": 4, "flair_hub": 4}
SHARD_MB = 16  # several of each dataset, so that a loader reads more than one at a time


def build(work: Path, dataset: str) -> Path:
    """Write a dataset in our formats; what exists is kept. Returns its folder."""
    folder = work / dataset
    layout = layout_of(datasets.spec(dataset), BATCH[dataset])
    if not (folder / "layout.json").exists():  # written last
        datasets.synth(dataset, folder / "raw", TILES[dataset], seed=0)
        raw = datasets.open_raw(dataset, folder / "raw", "train")
        for codec in CODECS:
            write_shards(
                raw, str(shards_of(folder, codec)), "train", workers=2, codec=codec, shard_mb=SHARD_MB
            )
        if not (folder / "samples").exists():
            _write_samples(folder, folder / "samples")
    layout.write(folder / "layout.json")
    return folder


def shards_of(folder: Path, codec: str) -> Path:
    """The shards of a dataset with a codec."""
    return folder / f"shards-{codec}"


def _write_samples(folder: Path, out: Path) -> None:
    partial = out.with_name("samples.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    url, number = str(shards_of(folder, "raw")), 0
    for info in Manifest.load(url).shards_of(["train"]):
        with Store(url, folder / "cache", 0).shard(info) as shard:
            for sample in shard:
                fields = {name: np.array(sample.array(name)) for name in sample.names}
                (partial / f"{number:06d}.safetensors").write_bytes(encode_fields(sample.key, fields))
                number += 1
    partial.rename(out)


def layout_of(spec: DatasetSpec, batch: int) -> Layout:
    """What a prepared sample of a dataset has, without code of this project."""
    transform = Transform(spec)
    fields = {(f.part, f.name): f for f in transform.fields}
    sensors = []
    for s in spec.sensors:
        modality, pixels = spec.modality(s.source), fields["pixels", s.name]
        is_whole = tuple(s.bands) == tuple(range(len(modality.bands)))
        sensors.append(
            SensorLayout(
                field=s.source,
                num_dates=s.num_dates,
                num_bands=len(s.bands),
                bands=() if is_whole else tuple(s.bands),
                resolution_m=modality.resolution_m,
                size=modality.size,
                side=pixels.shape[-1],
                dtype=modality.dtype,
                num_noise=fields["noise", s.name].shape[0],
                has_mask=bool(modality.mask_bands),
                mask_threshold=s.mask_threshold,
            )
        )
    targets = tuple(_target(spec, transform.grid, t, fields["targets", t.name]) for t in spec.targets)
    return Layout(tuple(sensors), targets, transform.grid.num_offsets, transform.grid.step_m, batch)


def _target(spec: DatasetSpec, grid: CropGrid, target: Target, field: Field) -> TargetLayout:
    source = spec.target(target.of) if target.of else target
    is_map = source.is_map
    stored = target_layout(source, spec)[0]
    return TargetLayout(
        field=target_field(target.name),
        shape=field.shape,
        dtype=field.dtype,
        resolution_m=source.resolution_m or 0.0,
        size=stored[0] if is_map else 0,
        side=grid.side(source.resolution_m, stored[0]) if is_map and source.resolution_m else 0,
        shares_of=target_field(source.name) if target.of else "",
        classes=tuple(source.classes.index(c) for c in target.classes) if target.of else (),
    )
