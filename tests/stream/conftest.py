"""A small dataset in shards: an image, a cloudy series, and a radar series with NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Sensor, Target, Tile
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.source import Source

# What a function returns is under test here, not how long a busy machine takes for it.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def _sensor(name: str, size: int, patch: int, dates: int, bands: tuple[int, ...]) -> Sensor:
    return Sensor(name, name, size, patch, dates, bands, (len(bands),), Scale(), name, name)


SPEC = DatasetSpec(
    name="toy",
    title="Toy",
    tile_m=60.0,
    crop_m=30.0,
    pos_grid=12,
    modalities=(
        Modality("aerial", ("R", "G", "B"), 2.5, 24, "uint8"),
        Modality("s2", ("B2", "B3"), 10.0, 6, "int16", series=True, mask_bands=("snow", "cloud")),
        Modality("s1", ("VV", "VH"), 10.0, 6, "float32", series=True),
    ),
    targets=(
        Target("kind", "multilabel", ("even", "odd"), threshold=0.5),
        Target("cover", "segmentation", ("a", "b", "c", "d"), resolution_m=10.0),
    ),
    sensors=(
        _sensor("aerial", 12, 4, 1, (0, 1, 2)),
        _sensor("s2", 4, 2, 3, (0, 1)),
        _sensor("s1", 4, 2, 2, (1, 0)),
    ),
)


def toy_tile(number: int) -> Tile:
    """Tile ``number``: aerial pixel values are its number plus the column; series have 5 to 9 dates."""
    rng = np.random.default_rng(number)
    num_s2, num_s1 = 5 + number % 5, 7
    aerial = np.broadcast_to(number % 200 + np.arange(24, dtype=np.uint8), (1, 3, 24, 24)).copy()
    s2 = (100 * np.arange(num_s2)[:, None, None, None] + rng.integers(0, 50, (num_s2, 2, 6, 6))).astype(
        np.int16
    )
    s1 = rng.random((num_s1, 2, 6, 6)).astype(np.float32)
    s1[2, 0, 1, 1] = np.nan
    mask = (rng.random((num_s2, 2, 1, 1)) < 0.2) * np.full((2, 6, 6), 80)

    def dates(count: int) -> np.ndarray:
        return np.stack([np.full(count, 2020), 10 * np.arange(count) + 1, np.zeros(count)], axis=1).astype(
            np.int16
        )

    return Tile(
        key=f"tile-{number:05d}",
        arrays={"aerial": aerial, "s2": s2, "s1": s1},
        dates={"aerial": dates(1), "s2": dates(num_s2), "s1": dates(num_s1)},
        masks={"s2": mask.astype(np.uint8)},
        targets={
            "kind": np.eye(2, dtype=np.float32)[number % 2],
            "cover": np.arange(36, dtype=np.uint8).reshape(6, 6) // 9,
        },
        ref_date=np.array([2020, 180, 0], np.int16),
    )


@pytest.fixture(scope="session")
def tile_of() -> Callable[[int], Tile]:
    """Makes toy tiles."""
    return toy_tile


@pytest.fixture(scope="session")
def write_toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """Write so many tiles as shards of eight or so, and open them."""

    def write(num_tiles: int, weight: float = 1.0, per_shard: int = 8) -> Source:
        root = tmp_path_factory.mktemp("toy")
        with Writer(str(root / "shards"), SPEC, "train") as writer:
            writer._shard_bytes = per_shard * 10_000
            for i in range(num_tiles):
                writer.add(toy_tile(i))
        return open_toy(root / "shards", root / "cache", weight)

    return write


def open_toy(shards: Path, cache: Path, weight: float = 1.0) -> Source:
    """The source of a folder of toy shards."""
    manifest = Manifest.load(str(shards))
    store = Store(str(shards), cache, 2**30)
    return Source(SPEC, manifest.shards_of(["train"]), store, weight)


@pytest.fixture(scope="session")
def toy(write_toy: Callable[..., Source]) -> Source:
    """100 tiles in several shards."""
    return write_toy(100)
