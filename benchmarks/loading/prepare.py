"""The preparation of a batch that every loader but ours shares: dates, crop, flips, noise, copied into one block.

numpy alone, and less work than ours: numbers come from one generator instead of a counter per sample, and NaN becomes 0
instead of the value of another date. Imported in the environment of the other loaders, which lacks maestro_scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

Fields = Mapping[str, np.ndarray]
_DTYPES = {
    "BOOL": "bool",
    **{
        f"{kind}{bits}": f"{name}{bits}"
        for kind, name in (("U", "uint"), ("I", "int"), ("F", "float"))
        for bits in (8, 16, 32, 64)
    },
}


@dataclass(frozen=True)
class SensorLayout:
    """A sensor in a batch. ``size``, ``side``: pixels per side as stored, and of the crop; ``bands``: empty for all."""

    field: str
    num_dates: int
    num_bands: int
    bands: tuple[int, ...]
    resolution_m: float
    size: int
    side: int
    dtype: str
    num_noise: int
    has_mask: bool
    mask_threshold: float


@dataclass(frozen=True)
class TargetLayout:
    """A target. ``shape``: in a batch. ``shares_of``: the map whose classes are counted, else empty. ``size`` and
    ``side``: pixels per side of the map, as stored and of the crop, 0 where there is no map."""

    field: str
    shape: tuple[int, ...]
    dtype: str
    resolution_m: float
    size: int
    side: int
    shares_of: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What a prepared sample has; written as JSON by the process that knows the dataset."""

    sensors: tuple[SensorLayout, ...]
    targets: tuple[TargetLayout, ...]
    num_offsets: int
    step_m: float
    batch: int

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Layout:
        """Read what :meth:`write` wrote."""
        content = json.loads(path.read_text())
        sensors = tuple(SensorLayout(**{**s, "bands": tuple(s["bands"])}) for s in content.pop("sensors"))
        targets = tuple(TargetLayout(**{**t, "shape": tuple(t["shape"])}) for t in content.pop("targets"))
        return cls(sensors, targets, **content)


def views(data: bytes | memoryview) -> dict[str, np.ndarray]:
    """The tensors of a safetensors buffer as views of it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    header.pop("__metadata__", None)
    buffer = np.frombuffer(data, np.uint8, offset=8 + size)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = buffer[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


class Preparation:
    """Prepares batches of samples given as named arrays."""

    def __init__(self, layout: Layout, seed: int = 0) -> None:
        self.layout = layout
        self._rng = np.random.default_rng(seed)

    def __call__(self, samples: Sequence[Fields]) -> dict[str, np.ndarray]:
        """A batch (size, …) by field: pixels, dates, noise, targets and the reference date."""
        size, layout = len(samples), self.layout
        out: dict[str, np.ndarray] = {"ref_date": np.empty((size, 3), np.int16)}
        for s in layout.sensors:
            out[s.field] = np.empty((size, s.num_dates, s.num_bands, s.side, s.side), s.dtype)
            out[f"{s.field}.dates"] = np.empty((size, s.num_dates, 3), np.int16)
            out[f"{s.field}.noise"] = self._rng.random((size, s.num_noise), np.float32)
        for t in layout.targets:
            out[t.field] = np.empty((size, *t.shape), t.dtype)
        for row, fields in enumerate(samples):
            self._write(fields, out, row)
        return out

    def num_bytes(self) -> int:
        """Bytes of a prepared sample."""
        one = {
            s.field: s.num_dates * (s.num_bands * s.side**2 * np.dtype(s.dtype).itemsize + 6)
            + 4 * s.num_noise
            for s in self.layout.sensors
        }
        targets = sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in self.layout.targets)
        return sum(one.values()) + targets + 6

    def _write(self, fields: Fields, out: dict[str, np.ndarray], row: int) -> None:
        rng, layout = self._rng, self.layout
        corner_m = rng.integers(layout.num_offsets, size=2) * layout.step_m
        flips = int(rng.integers(8))
        for s in layout.sensors:
            window = _window(corner_m, s.resolution_m, s.size, s.side)
            chosen = self._dates(fields, s, window)
            pixels = _cropped(fields[s.field], window)[chosen]
            if s.bands:
                pixels = pixels[:, s.bands]
            if pixels.dtype.kind == "f":
                pixels = np.nan_to_num(pixels)
            out[s.field][row] = _oriented(pixels, flips)
            out[f"{s.field}.dates"][row] = fields[f"{s.field}.dates"][chosen]
        out["ref_date"][row] = fields["ref_date"]
        for t in layout.targets:
            window = _window(corner_m, t.resolution_m, t.size, t.side) if t.size else ()
            if t.shares_of:
                classes = _cropped(fields[t.shares_of], window)
                counts = np.bincount(classes.reshape(-1), minlength=256)[list(t.classes)]
                out[t.field][row] = counts / np.float32(classes.size)
            elif t.side:
                out[t.field][row] = _oriented(_cropped(fields[t.field], window), flips)
            else:
                out[t.field][row] = fields[t.field]

    def _dates(self, fields: Fields, s: SensorLayout, window: tuple[slice, ...]) -> np.ndarray:
        """One date of each bin, at random, of those without cloud and snow where there are some."""
        stored, rng = len(fields[s.field]), self._rng
        if stored <= s.num_dates:
            return np.arange(s.num_dates) * stored // s.num_dates
        priority = rng.random(stored)
        if s.has_mask:
            mask = _cropped(fields[f"{s.field}.mask"], window)
            priority += mask.reshape(stored, -1).max(axis=1) > s.mask_threshold
        size = stored // s.num_dates
        skip = int(rng.integers(stored % s.num_dates + 1))
        first = skip + size * np.arange(s.num_dates)
        return first + priority[skip : skip + size * s.num_dates].reshape(-1, size).argmin(axis=1)


def _window(corner_m: np.ndarray, resolution_m: float, size: int, side: int) -> tuple[slice, ...]:
    if side == size:
        return ()
    top, left = (min(round(m / resolution_m), size - side) for m in corner_m)
    return slice(top, top + side), slice(left, left + side)


def _cropped(pixels: np.ndarray, window: tuple[slice, ...]) -> np.ndarray:
    if not window:
        return pixels
    rows, columns = window
    return pixels[..., rows, columns]


def _oriented(pixels: np.ndarray, flips: int) -> np.ndarray:
    if flips & 1:
        pixels = pixels[..., ::-1, :]
    if flips & 2:
        pixels = pixels[..., ::-1]
    return pixels.swapaxes(-1, -2) if flips & 4 else pixels
