"""A small dataset for the tests of shards, in an importable module so that writer processes can unpickle it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace

import numpy as np

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Modality, Scale, Sensor, Target, Tile

SPEC = DatasetSpec(
    name="toy",
    title="Toy",
    tile_m=8.0,
    crop_m=8.0,
    pos_grid=4,
    modalities=(
        Modality("aerial", ("R", "G", "B"), 0.2, 40, "uint8"),
        Modality("s2", ("B2", "B3"), 1.0, 8, "int16", series=True, mask_bands=("snow", "cloud")),
        Modality("s1", ("VV",), 1.0, 8, "float16", series=True),
    ),
    targets=(
        Target("kinds", "multilabel", ("oak", "pine", "beech"), threshold=0.1),
        Target("cover", "segmentation", ("soil", "water", "void"), ignored=(2,), resolution_m=1.0),
    ),
    sensors=(
        Sensor("aerial", "aerial", 40, 8, 1, (0, 1, 2), (3,), Scale("linear", 255), "aerial", "aerial"),
        Sensor("s2", "s2", 8, 2, 4, (0, 1), (1, 1), Scale("linear", 5000), "s2", "s2"),
    ),
    ref_sensor="aerial",
)


def tile(key: str) -> Tile:
    """A tile that depends on its key alone; about every third tile has a note."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    num_s2, num_s1 = (int(n) for n in rng.integers(2, 7, 2))

    def dates(count: int) -> np.ndarray:
        return np.stack(
            [np.full(count, 2019), np.sort(rng.integers(1, 366, count)), np.zeros(count)], 1
        ).astype(np.int16)

    smooth = np.cumsum(rng.integers(-3, 4, (1, 3, 40, 40)), axis=-2)
    return Tile(
        key=key,
        arrays={
            "aerial": (128 + smooth).astype(np.uint8),
            "s2": rng.integers(-5, 10_000, (num_s2, 2, 8, 8)).astype(np.int16),
            "s1": rng.normal(size=(num_s1, 1, 8, 8)).astype(np.float16),
        },
        dates={"aerial": dates(1), "s2": dates(num_s2), "s1": dates(num_s1)},
        masks={"s2": rng.integers(0, 101, (num_s2, 2, 8, 8)).astype(np.uint8)},
        targets={
            "kinds": rng.random(3).astype(np.float32),
            "cover": rng.integers(0, 3, (8, 8)).astype(np.uint8),
        },
        ref_date=np.array([2019, 180, 0], np.int16),
        notes=("odd one",) if seed % 3 == 0 else (),
    )


def toy_keys(count: int) -> list[str]:
    """Keys with dots and other special characters, as in real datasets."""
    return sorted(f"Betula_spec._{i}_a/b%{i % 3}" for i in range(count))


@dataclass(frozen=True)
class Toy:
    """A raw dataset of toy tiles. ``broken`` keys cannot be read; each read takes ``pause_s``."""

    count: int
    broken: tuple[str, ...] = ()
    pause_s: float = 0.0
    spec: DatasetSpec = SPEC

    def keys(self) -> list[str]:
        return toy_keys(self.count)

    def read(self, key: str) -> Tile:
        time.sleep(self.pause_s)
        if key in self.broken:
            raise DatasetError(f"{key}.h5: is truncated; fetch it again")
        return tile(key)


WIDE_SPEC = replace(
    SPEC, modalities=(replace(SPEC.modalities[0], resolution_m=0.004, size=2000), *SPEC.modalities[1:])
)


@dataclass(frozen=True)
class Wide(Toy):
    """Tiles of 12 MB."""

    spec: DatasetSpec = WIDE_SPEC

    def read(self, key: str) -> Tile:
        small = tile(key)
        number = int(small.arrays["aerial"][0, 0, 0, 0])
        aerial = np.full((1, 3, 2000, 2000), number, np.uint8)
        return replace(small, arrays={**small.arrays, "aerial": aerial})


TILE_BYTES = 8_800  # approximate size with the raw codec


def fields_equal(sample, wanted: Tile) -> bool:
    """Whether a sample contains exactly the arrays of a tile."""
    from maestro_scale.shards.format.fields import tile_fields

    fields = tile_fields(wanted)
    return set(sample.names) == set(fields) and all(
        sample.dtype(name) == a.dtype
        and sample.shape(name) == a.shape
        and np.array_equal(sample.array(name), a)
        for name, a in fields.items()
    )
