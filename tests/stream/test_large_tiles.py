"""Tiles larger than a crop: sensors are cropped alike, crops assemble to the tile, only the crop is read."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maestro_scale.datasets.pastis_hd.reader import SPEC
from maestro_scale.datasets.spec import Tile
from maestro_scale.shards.format import compress
from maestro_scale.shards.format.codec import Sample, encode
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.packing import arrays_in, num_bytes
from maestro_scale.stream.stored_sample import StoredSample
from maestro_scale.stream.transform import Transform


def tile_of(arrays: dict[str, np.ndarray], labels: np.ndarray) -> Tile:
    dates = {m: np.array([(2019, 1 + t, 0) for t in range(len(a))], np.int16) for m, a in arrays.items()}
    targets = {"crop_type": labels, "crops_present": np.zeros(18, np.float32)}
    return Tile("t", arrays, dates, {}, targets, np.array((2019, 182, 0), np.int16))


def ramp() -> Tile:
    """Every pixel says where it is: the row and column of its cell of 10 m, SPOT also where in the cell it is."""
    row, column = np.mgrid[:128, :128]
    fine_row, fine_column = np.mgrid[:1280, :1280]
    spot = np.stack([fine_row // 10, fine_column // 10, fine_row % 10 * 10 + fine_column % 10])
    s2 = np.stack([row, column] * 5) + np.zeros((20, 1, 1, 1), np.int64)
    s1 = np.stack([row, column, row - column]) + np.zeros((9, 1, 1, 1), np.int64)
    arrays = {"spot": spot[None].astype(np.uint8), "s2": s2.astype(np.int16)}
    arrays |= {"s1_asc": s1.astype(np.float16), "s1_des": s1[:6].astype(np.float16)}
    return tile_of(arrays, ((row + 3 * column) % 19).astype(np.uint8))


def prepared(
    transform: Transform, sample: StoredSample, number: int | None, crop: int = 0
) -> dict[str, np.ndarray]:
    """{sensor or target: array} of a sample; evaluation if ``number`` is None."""
    block = torch.zeros(num_bytes(transform.fields, 1), dtype=torch.uint8)
    out = arrays_in(block, transform.fields, 1)
    if number is None:
        transform.evaluate(sample, crop, out, 0)
    else:
        transform.train(sample, 0, number, out, 0)
    return {f.name: a[0] for f, a in out.items() if f.part in ("pixels", "targets")}


@pytest.mark.parametrize("codec", CODECS)
def test_a_ramp_in_every_sensor_is_cropped_alike(codec: str):
    transform, sample = Transform(SPEC, seed=5), Sample(encode(ramp(), codec))
    corners, turned = [], set()
    for number in range(12):
        seen = prepared(transform, sample, number)
        cells = seen["s2"][:, :2].astype(int)
        assert cells.shape == (16, 2, 16, 16)
        assert (cells == cells[0]).all()  # whatever the date
        row, column = cells[0]
        for name in ("s1_asc", "s1_des"):
            assert (seen[name].astype(int) == cells[0]).all()
        np.testing.assert_array_equal(seen["crop_type"], (row + 3 * column) % 19)
        fine = seen["spot"][0].astype(int)
        np.testing.assert_array_equal(fine[:2], np.kron(cells[0], np.ones((1, 10, 10), int)))
        # Within a cell SPOT's pixels run the way that the cells do.
        south, east = np.diff(fine[2, :10, 0])[0], np.diff(fine[2, 0, :10])[0]
        transposed = abs(south) == 1
        assert {abs(south), abs(east)} == {1, 10}
        assert south == np.diff(column if transposed else row, axis=0)[0, 0] * (1 if transposed else 10)
        assert east == np.diff(row if transposed else column, axis=1)[0, 0] * (10 if transposed else 1)
        turned.add((south, east))
        corners.append((row.min(), column.min()))
        assert (np.ptp(row), np.ptp(column)) == (15, 15)
    assert len(turned) > 4
    assert len(set(corners)) == 12
    assert any(r % 16 or c % 16 for r, c in corners)  # anywhere, not on a coarse grid


@pytest.mark.parametrize("codec", CODECS)
def test_the_crops_of_evaluation_assemble_to_the_tile(codec: str):
    tile = ramp()
    transform, sample = Transform(SPEC), Sample(encode(tile, codec))
    assert transform.grid.num_crops == 64
    spot, label = np.zeros((3, 1280, 1280), np.uint8), np.full((128, 128), 255, np.uint8)
    for number in range(64):
        seen, crop = prepared(transform, sample, None, number), transform.grid.tiling(number)
        transform.grid.cut(spot, crop, 1.0)[...] = seen["spot"][0]
        transform.grid.cut(label, crop, 10.0)[...] = seen["crop_type"]
    np.testing.assert_array_equal(spot, tile.arrays["spot"][0])
    np.testing.assert_array_equal(label, tile.targets["crop_type"])


@pytest.fixture(scope="module")
def real_size() -> Tile:
    """As large as the release's: 61 dates of Sentinel-2, 70 of each Sentinel-1 orbit; no value repeats another."""
    rng = np.random.default_rng(0)
    shapes = {
        m.name: (n, len(m.bands), m.size, m.size)
        for m, n in zip(SPEC.modalities, (1, 61, 70, 70), strict=True)
    }
    arrays = {
        "spot": rng.integers(0, 256, shapes["spot"], np.uint8),
        "s2": rng.integers(0, 10_000, shapes["s2"], np.int16),
        "s1_asc": -rng.random(shapes["s1_asc"], np.float32).astype(np.float16) - 1,
        "s1_des": -rng.random(shapes["s1_des"], np.float32).astype(np.float16) - 1,
    }
    return tile_of(arrays, rng.integers(0, 19, (128, 128), np.uint8))


class CountingSpan:
    """A sample's bytes that count what is read of them."""

    def __init__(self, payload: bytes) -> None:
        self._view, self.read_bytes = memoryview(payload), 0

    def __len__(self) -> int:
        return len(self._view)

    def read(self, begin: int, end: int) -> memoryview:
        self.read_bytes += end - begin
        return self._view[begin:end]


@pytest.mark.parametrize("codec", CODECS)
def test_16_dates_of_one_crop_are_a_small_part_of_what_is_read_and_decoded(
    codec: str, real_size: Tile, monkeypatch
):
    payload, transform = encode(real_size, codec), Transform(SPEC, seed=1)
    total = sum(a.nbytes for a in real_size.arrays.values())
    decoded = 0
    decode = compress._frame

    def counted(*args):
        nonlocal decoded
        frame = decode(*args)
        decoded += frame.nbytes
        return frame

    monkeypatch.setattr(compress, "_frame", counted)
    for number in range(4):
        decoded, span = 0, CountingSpan(payload)
        seen = prepared(transform, Sample(span), number)
        assert seen["s2"].shape == (16, 10, 16, 16)
        moved = sum(a.nbytes for n, a in seen.items() if n in real_size.arrays)
        assert moved <= span.read_bytes < 0.12 * len(payload)
        assert (codec == "raw") == (decoded == 0)
        assert decoded < 0.12 * total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel which pages were read")
@pytest.mark.parametrize("codec", CODECS)
def test_the_system_reads_no_more_from_disk_than_a_quarter_of_a_tile(
    codec: str, real_size: Tile, tmp_path: Path
):
    url = str(tmp_path / "shards")
    with Writer(url, SPEC, "train", codec=codec) as writer:
        writer.add(real_size)
    (info,) = Manifest.load(url).shards
    path, transform = tmp_path / "shards" / info.path, Transform(SPEC, seed=1)
    with Store(url, tmp_path / "cache", 10**9).shard(info) as shard:
        for number in range(3):
            if evicted(path) > 0:
                pytest.skip("the file stays in memory, as on tmpfs")
            prepared(transform, shard[0], number)
            assert 0 < resident_bytes(path) < 0.25 * info.bytes


def evicted(path: Path) -> int:
    """Have the system forget a file; how many bytes of it stay in memory."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_bytes(path)


def resident_bytes(path: Path) -> int:
    """Bytes of a file that the system holds in memory."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        start = (ctypes.c_char * len(view)).from_buffer(view)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(view)), pages)
        del start
    assert not failed
    return mmap.PAGESIZE * int((np.frombuffer(pages, np.uint8) & 1).sum())
