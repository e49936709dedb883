"""Measures the statistics of the pixels of a dataset in shards, on a sample of its tiles."""

from __future__ import annotations

from maestro_scale.datasets.patterns import evenly
from maestro_scale.datasets.spec import DatasetError, DatasetSpec
from maestro_scale.datasets.statistics import DatasetStatistics, TileStatistics, tile_statistics
from maestro_scale.shards.errors import BadShard, CodecError
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.fields import check_layouts, dates_field, mask_field
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.read.preview import read_samples

MAX_SHARDS = 16  # of one dataset that are opened: a shard without an index is downloaded


def measure(url: str, max_tiles: int) -> DatasetStatistics:
    """The statistics of at most ``max_tiles`` tiles, evenly spaced in at most 16 shards that are evenly spaced.

    The samples of all splits count. One tile is in memory at a time. ManifestError or StoreError if the dataset cannot
    be read or a sample differs from the spec.
    """
    manifest = Manifest.load(url)
    shards = [manifest.shards[i] for i in evenly(len(manifest.shards), min(MAX_SHARDS, max_tiles))]
    statistics = DatasetStatistics()
    for number, info in enumerate(shards):
        of_shard = (max_tiles * (number + 1)) // len(shards) - (max_tiles * number) // len(shards)
        for sample in read_samples(url, info, evenly(info.samples, of_shard).tolist()):
            try:
                statistics.add(sample_statistics(sample, _spec_of(manifest.spec, info)))
            except (CodecError, DatasetError) as error:
                raise BadShard(f"{url}/{info.path}", str(error)) from error
    return statistics


def sample_statistics(sample: Sample, spec: DatasetSpec) -> TileStatistics:
    """The statistics of one stored sample. DatasetError if its fields differ from the spec."""
    check_layouts(sample.key, {n: (sample.shape(n), str(sample.dtype(n))) for n in sample.names}, spec)
    return tile_statistics(
        spec,
        {m.name: sample.array(m.name) for m in spec.modalities},
        {m.name: sample.array(dates_field(m.name)) for m in spec.modalities},
        {m.name: sample.array(mask_field(m.name)) for m in spec.modalities if m.mask_bands},
    )


def _spec_of(spec: DatasetSpec, info: ShardInfo) -> DatasetSpec:
    """The spec of the tiles of a shard, which may lack modalities."""
    if not info.absent:
        return spec
    return spec.select([m.name for m in spec.modalities if m.name not in info.absent])
