"""Tensors or arrays by sensor as the inputs of a model: one tensor for one sensor, images without an axis of dates, no
dates at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.spec import Sensor
from maestro_scale.stream.batch import Batch

Pixels = Mapping[str, Any] | Tensor | np.ndarray
"""{sensor: (B, D, C, H, W)} raw values; (B, C, H, W) is one date; without a mapping: of a model with one sensor."""

MIDSUMMER = (2020, 183, 12)
"""Year, day of the year and hour that are taken where no date is known."""


def named_inputs(
    sensors: Sequence[Sensor],
    pixels: Pixels,
    dates: Mapping[str, Any] | None = None,
    ref_date: Any = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """(pixels {sensor: (B, D, C, H, W)}, dates {sensor: (B, D, 3)}, ref_date (B, 3)) in the order of ``sensors``.

    ``dates``: of each sensor (B, D, 3) year, day of the year, hour; those of a sensor that has none are the reference
    date, and an image without any date was taken in summer. ``ref_date``: None: the first date of the first sensor.

    Raises:
        TypeError: neither tensors nor arrays.
        ValueError: another sensor, or shapes that do not fit; the message says what does.
    """
    names = [s.name for s in sensors]
    if not isinstance(pixels, Mapping):
        if len(names) != 1:
            raise ValueError(
                f"the model has the sensors {', '.join(names)}: give {{sensor: tensor (B, dates, bands, H, W)}}"
            )
        pixels = {names[0]: pixels}
    given = {name: _tensor(name, value) for name, value in pixels.items()}
    unknown = [name for name in (*given, *(dates or {})) if name not in names]
    if unknown or not given:
        what = f"has no sensor {unknown[0]!r}" if unknown else "was given no sensor"
        raise ValueError(f"the model {what}; it has: {', '.join(names)}")
    images = {}
    for name in (n for n in names if n in given):
        x = given[name]
        if x.dim() not in (4, 5):
            raise ValueError(
                f"sensor {name}: {tuple(x.shape)}; give (B, dates, bands, H, W), or (B, bands, H, W) of one date"
            )
        if x.shape[-1] != x.shape[-2]:
            raise ValueError(
                f"sensor {name}: images of {x.shape[-2]} by {x.shape[-1]} pixels; give square ones"
            )
        images[name] = x.unsqueeze(1) if x.dim() == 4 else x
    first = next(iter(images.values()))
    if any(x.shape[0] != first.shape[0] for x in images.values()):
        sizes = ", ".join(f"{name} {x.shape[0]}" for name, x in images.items())
        raise ValueError(f"sensors have different numbers of samples: {sizes}")
    when = {name: _tensor(f"dates of {name}", value) for name, value in (dates or {}).items()}
    for name, x in images.items():
        if name in when and tuple(when[name].shape) != (x.shape[0], x.shape[1], 3):
            raise ValueError(
                f"sensor {name}: dates {tuple(when[name].shape)} for images {tuple(x.shape)}; give (B, dates, 3): "
                "year, day of the year, hour"
            )
    reference = _reference(ref_date, [when[n] for n in images if n in when], first)
    for name, x in images.items():
        if name not in when:
            when[name] = reference[:, None].expand(-1, x.shape[1], -1)
    return images, {name: when[name] for name in images}, reference


def tensors_batch(
    dataset: str,
    sensors: Sequence[Sensor],
    pixels: Pixels,
    dates: Mapping[str, Any] | None = None,
    ref_date: Any = None,
) -> Batch:
    """As ``named_inputs``, as a batch of ``dataset``."""
    images, when, reference = named_inputs(sensors, pixels, dates, ref_date)
    if not len(reference):
        raise ValueError("the batch has no samples")
    keys = tuple(map(str, range(len(reference))))
    return Batch(dataset, images, when, reference, {}, {}, keys, keys)


def _reference(given: Any, dates: Sequence[Tensor], like: Tensor) -> Tensor:
    if given is not None:
        found = _tensor("ref_date", given)
        return found.expand(like.shape[0], -1) if found.dim() == 1 else found
    if dates:
        return dates[0][:, 0]
    return torch.tensor(MIDSUMMER, dtype=torch.int16).to(like.device).expand(like.shape[0], -1)


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | list | tuple | np.generic):
        return torch.from_numpy(np.ascontiguousarray(value))
    raise TypeError(f"{name} is {type(value).__name__}: give a tensor or an array")
