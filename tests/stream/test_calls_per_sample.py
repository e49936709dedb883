"""Python calls and system calls of a prepared sample: they do not depend on the machine, as its time does."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetSpec, Tile
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.batch_builder import BatchBuilder, BatchRequest, BuilderSettings, SampleRef
from maestro_scale.stream.source import Source

SIZE = 12  # samples of the batch


def tile_of(spec: DatasetSpec, number: int, num_dates: int) -> Tile:
    """A tile without NaN, clouds and snow, with ``num_dates`` dates of every series."""
    counts = {m.name: num_dates if m.series else 1 for m in spec.modalities}
    return Tile(
        key=f"tile-{number}",
        arrays={
            m.name: np.full((counts[m.name], len(m.bands), m.size, m.size), number, m.dtype)
            for m in spec.modalities
        },
        dates={name: np.full((count, 3), (2020, 100, 10), np.int16) for name, count in counts.items()},
        masks={
            m.name: np.zeros((counts[m.name], len(m.mask_bands), m.size, m.size), np.uint8)
            for m in spec.modalities
            if m.mask_bands
        },
        targets={t.name: np.zeros(len(t.classes), np.float32) for t in spec.targets},
        ref_date=np.array([2020, 180, 0], np.int16),
    )


def calls_of_a_batch(spec: DatasetSpec, folder: Path) -> tuple[Counter[str], Counter[str]]:
    """Calls of Python functions and of C functions by name, while a batch is built; a batch before it had samples with
    the same numbers of dates."""
    with Writer(str(folder / "shards"), spec, "train") as writer:
        for number in range(2 * SIZE):
            writer.add(tile_of(spec, number, 40 + number % 2))
    store = Store(str(folder / "shards"), folder / "cache", 2**30)
    source = Source(spec, Manifest.load(str(folder / "shards")).shards_of(["train"]), store)
    assert source.counts == (2 * SIZE,)
    builder = BatchBuilder(BuilderSettings((source,)))
    block = torch.empty(builder.num_bytes(SIZE), dtype=torch.uint8)
    first, second = (tuple(SampleRef(n, 0, n) for n in range(s, s + SIZE)) for s in (0, SIZE))
    builder.build(BatchRequest(0, 0, first), block)
    calls: dict[str, Counter[str]] = {"call": Counter(), "c_call": Counter()}

    def count(frame, event: str, argument) -> None:
        if event in calls:
            calls[event][frame.f_code.co_name if event == "call" else argument.__name__] += 1

    sys.setprofile(count)
    try:
        builder.build(BatchRequest(0, 0, second), block)
    finally:
        sys.setprofile(None)
        builder.close()
    return calls["call"], calls["c_call"]


def test_a_sample_of_treesatai_takes_at_most_135_python_calls_and_one_read(tmp_path: Path):
    python, compiled = calls_of_a_batch(datasets.spec("treesatai_ts"), tmp_path)
    # About 35 for the sample and its header, and 22 for each of four sensors.
    assert python.total() <= 135 * SIZE
    assert compiled["pread"] == SIZE
    # Headers that differ in the key alone were parsed and checked with the first batch.
    assert python["parse_safetensors_header"] == python["check_modality"] == 0
    # Noise becomes numbers once per sensor, not once per sample and sensor.
    assert python["uniforms"] == 4
