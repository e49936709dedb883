"""The format of ``counts.npz``: per-tile counts of an evaluation, so that two results can be compared in pairs later.

The sum of the counts over tiles is what a metric is computed from (``metrics.STATISTICS``). Most counts are zero, so
they are stored compressed: 3 bytes per tile of TreeSatAI-TS, 150 of PASTIS-HD, 230 of FLAIR-HUB, and the keys.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass

import numpy as np

from maestro_scale import untrusted

FILE = "counts.npz"

MAX_PER_TILE = 2**20
"""Counts of a tile; segmentation with 255 classes has 65,280."""

_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)


@dataclass(frozen=True)
class TileCounts:
    """Counts of each tile of a test split."""

    keys: tuple[str, ...]
    """Keys of the T tiles, in the order of the manifest."""
    array: np.ndarray
    """(T, …) integers, or float64 where a metric needs sums of measurements."""

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.array):
            raise ValueError(f"{len(self.keys)} keys for counts of {len(self.array)} tiles")

    def dumps(self) -> bytes:
        """As an ``.npz`` file; equal counts give equal bytes. ValueError if a count is not finite."""
        names = json.dumps(self.keys).encode()
        archive = io.BytesIO()
        np.savez_compressed(archive, keys=np.frombuffer(names, np.uint8), counts=_smallest(self.array))
        return archive.getvalue()

    @classmethod
    def loads(cls, content: bytes) -> TileCounts:
        """Read a file of ``dumps``. InputError if it is malformed or has more than ``COUNTS_BYTES``, twice the 58 MB
        of 60,000 tiles of FLAIR-HUB."""
        keys, counts = untrusted.parse_npz(content, ("keys", "counts"), untrusted.COUNTS_BYTES)
        if keys.dtype != np.uint8 or keys.ndim != 1:
            raise untrusted.InputError("its keys are not bytes")
        names = untrusted.field_of(untrusted.load_json(keys.tobytes(), "keys"), list, where="keys")
        if not all(isinstance(name, str) for name in names):
            raise untrusted.InputError("has a key that is not a text")
        if counts.ndim < 1 or len(counts) != len(names):
            raise untrusted.InputError(f"has counts of shape {counts.shape} for {len(names)} keys")
        if math.prod(counts.shape[1:]) > MAX_PER_TILE:  # their sum has 8 bytes for each
            raise untrusted.InputError(f"has more than {MAX_PER_TILE} counts per tile")
        is_float = counts.dtype.kind == "f"
        if counts.dtype.kind not in "uif" or (is_float and not np.isfinite(counts).all()):
            raise untrusted.InputError("has counts that are not finite numbers")
        return cls(tuple(names), counts)


def _smallest(counts: np.ndarray) -> np.ndarray:
    """The counts in the smallest integer type that holds them; float64 where one has a fraction."""
    counts = counts.astype(np.uint8) if counts.dtype == bool else counts
    if counts.dtype.kind == "f":
        if not np.isfinite(counts).all():
            raise ValueError("a count is not finite")
        if (counts != np.rint(counts)).any() or np.abs(counts).max(initial=0) >= 2**53:
            return counts.astype(np.float64)
    low, high = int(counts.min(initial=0)), int(counts.max(initial=0))
    fits = (t for t in _INTEGERS if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return counts.astype(next(fits))
