"""How the numbers of an array are to be understood: attributes of the CF conventions, section 8.1 and 2.5.1."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Packing:
    """How stored numbers are to be understood, by attributes of CF."""

    stored: np.dtype
    unsigned: bool
    missing: tuple[float, ...]
    lowest: float | None
    highest: float | None
    scale: float | None  # None: values stay as they are stored
    offset: float

    @classmethod
    def of(
        cls, dtype: np.dtype, attribute: Callable[[str], Any], unpack: bool, labels: Container[float] = ()
    ) -> Packing:
        """``labels``: numbers that are labels, even if they are the fill value."""

        def numbers(name: str) -> list[float]:
            value = attribute(name)
            found = np.asarray([] if value is None else value).reshape(-1)
            return [v for v in found.tolist() if isinstance(v, (int, float))] if found.size < 100 else []

        unsigned = str(attribute("_Unsigned")).lower() == "true" and dtype.kind == "i"
        low, high = numbers("valid_min")[:1], numbers("valid_max")[:1]
        if len(both := numbers("valid_range")) == 2:
            low, high = both[:1], both[1:]
        scale, offset = numbers("scale_factor")[:1], numbers("add_offset")[:1]
        packed = unpack and bool(scale or offset)
        return cls(
            np.dtype(dtype),
            unsigned,
            tuple(n for n in numbers("_FillValue") + numbers("missing_value") if n not in labels),
            low[0] if low else None,
            high[0] if high else None,
            (scale or [1.0])[0] if packed else None,
            (offset or [0.0])[0],
        )

    @property
    def dtype(self) -> np.dtype:
        stored = self._stored
        if self.scale is None:
            return stored
        return np.dtype(np.float32 if stored.itemsize <= 2 or stored == np.float32 else np.float64)

    @property
    def _stored(self) -> np.dtype:
        native = self.stored.newbyteorder("=")
        return np.dtype(f"u{native.itemsize}") if self.unsigned else native

    def unpack(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The values, and which are missing."""
        values = values.astype(self.stored.newbyteorder("="), copy=False)
        values = values.view(self._stored) if self.unsigned else values
        missing = np.zeros(values.shape, bool)
        for fill in self.missing:
            if np.isnan(fill):
                missing |= np.isnan(values) if values.dtype.kind == "f" else False
            elif values.dtype.kind == "f":
                with np.errstate(over="ignore"):
                    missing |= values == values.dtype.type(fill)
            else:
                limits = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None
                number = int(fill) % (limits.max + 1) if limits and self.unsigned and fill < 0 else fill
                missing |= values == number
        if self.lowest is not None:
            missing |= values < self.lowest
        if self.highest is not None:
            missing |= values > self.highest
        if self.scale is not None:
            values = (values * float(self.scale) + float(self.offset)).astype(self.dtype)
        return values, missing if missing.any() else None
