"""Our loader, the authors' files, and the lower bound, read into the same batches."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loading.data import shards_of
from benchmarks.loading.prepare import Layout, Preparation
from maestro_scale import datasets
from maestro_scale.shards.format.fields import tile_fields
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source

_STEPS = 10**9
_VARIANTS = 64  # of the places of reads


def shards(url: str, dataset: str, batch: int, cache: Path) -> Iterator[Any]:
    """Batches of our loader in its random order, without worker processes."""
    store = Store(url, cache, 100 * 2**30)
    source = Source(datasets.spec(dataset), Manifest.load(url).shards_of(["train"]), store)
    loader = TrainLoader([source], 0, lanes=1, global_batch=batch, micro_batch=batch)
    try:
        for step in loader.steps(0, _STEPS):
            yield step.batches[0]
    finally:
        loader.close()


def files(folder: Path, dataset: str, prepare: Preparation) -> Iterator[Any]:
    """The authors' layout: every image of a tile in a file of its own, as the datasets are released."""
    raw = datasets.open_raw(dataset, folder / "raw", "train")
    keys, size = raw.keys(), prepare.layout.batch
    for first in range(0, len(keys) - size + 1, size):
        yield prepare([tile_fields(raw.read(key)) for key in keys[first : first + size]])


class LowerBound:
    """Copies of the bytes of prepared samples, and reads of the stored bytes that they need: nothing else.

    A whole sample is one read, a crop one read per image: the rows of pixels that it crosses, at a random place, since
    the same rows of each sample would be in the processor's cache.
    """

    def __init__(self, folder: Path) -> None:
        layout = Layout.read(folder / "layout.json")
        self._prepared = Preparation(layout).num_bytes()
        self._batch = layout.batch
        self._stored = min(path.stat().st_size for path in (folder / "samples").iterdir())
        self._reads = list(_reads(layout, self._stored))
        rng = np.random.default_rng(0)
        self._variants = [
            [
                (int(rng.integers(self._stored - size + 1)) if len(self._reads) > 1 else 0, size)
                for _, size in self._reads
            ]
            for _ in range(_VARIANTS)
        ]
        shards = sorted(shards_of(folder, "raw").glob("*.tar"))
        self._places = [
            (p, i) for p in shards for i in range(0, p.stat().st_size - self._stored, self._stored)
        ]

    @property
    def read_bytes(self) -> int:
        """Bytes read for a sample."""
        return sum(size for _, size in self._reads)

    def __call__(self) -> Iterator[Any]:
        """One pass over the shards, in batches."""
        buffer = memoryview(bytearray(max(size for _, size in self._reads)))
        variants = itertools.cycle(
            [(offset, [buffer[:size]]) for offset, size in reads] for reads in self._variants
        )
        source = np.ones(self._prepared, np.uint8)
        descriptors = {path: os.open(path, os.O_RDONLY) for path in {path for path, _ in self._places}}
        try:
            for first in range(0, len(self._places) - self._batch + 1, self._batch):
                block = np.empty((self._batch, self._prepared), np.uint8)
                for row, (path, begin) in zip(block, self._places[first : first + self._batch], strict=True):
                    for offset, views in next(variants):
                        os.preadv(descriptors[path], views, begin + offset)
                    row[:] = source
                yield block
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)


def _reads(layout: Layout, stored: int) -> Iterator[tuple[int, int]]:
    """(place in the sample, bytes) of each read."""
    if all(s.side == s.size for s in layout.sensors):
        yield 0, min(stored, Preparation(layout).num_bytes())
        return
    place = 0
    for s in layout.sensors:
        line = s.size * np.dtype(s.dtype).itemsize
        for _ in range(s.num_dates * s.num_bands):
            yield place, s.side * line
            place += s.size * line
