"""What is predicted: the channels that are blended, and the images or columns that are made of them.

Shapes: B windows, C channels, H×W pixels of a part of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from maestro_scale.datasets.cog import Bands
from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.evaluation.features.missing import completed, token_order
from maestro_scale.inference.errors import InferenceError
from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.batch import Batch

NO_CLASS = 255
PERCENT = 250
"""Stored probabilities are whole numbers from 0 to this; the image says so as its scale, 0.004."""


@dataclass(frozen=True)
class Image:
    """One file per area: ``folder`` below the output, empty for the output itself."""

    folder: str
    bands: Bands


class MapOutput(Protocol):
    """A map of pixels of ``resolution_m``. ``num_channels``: C."""

    resolution_m: float
    num_channels: int
    images: tuple[Image, ...]

    def values(self, batch: Batch) -> Tensor | None:
        """(B, C, n, n) of the windows of a batch; None if their sensors say nothing about it."""
        ...

    def finish(self, mean: Tensor, covered: Tensor) -> list[np.ndarray]:
        """The values (bands, H, W) of each image from the blended channels (C, H, W) and where there are any (H, W).

        May change ``mean``."""
        ...


class PointOutput(Protocol):
    """Columns with a value per window."""

    def columns(self, batch: Batch) -> dict[str, tuple[pa.DataType, list[Any]]]:
        """{column: (type, values)}."""
        ...


class ClassMap:
    """Classes, and with ``probabilities`` an image of these, of a finetuned segmentation."""

    def __init__(self, model: Maestro, target: Target, probabilities: bool) -> None:
        assert target.resolution_m is not None
        self._model, self._target = model, target
        self.resolution_m = target.resolution_m
        counted = [i for i in range(len(target.classes)) if i not in target.ignored]
        if NO_CLASS in counted:
            raise InferenceError(f"{target.name} has a class {NO_CLASS}, which stands for no value in maps")
        self._values = np.array(counted, np.uint8)
        self.num_channels = len(counted)
        names = {i: target.classes[i] for i in counted}
        self.images: tuple[Image, ...] = (Image("", Bands((target.name,), "uint8", NO_CLASS, names)),)
        if probabilities:
            bands = Bands(tuple(names.values()), "uint8", NO_CLASS, scale=1 / PERCENT)
            self.images += (Image("probabilities", bands),)

    def values(self, batch: Batch) -> Tensor | None:
        """As of MapOutput."""
        return self._model.predict(batch, self._target.name).probabilities

    def finish(self, mean: Tensor, covered: Tensor) -> list[np.ndarray]:
        """As of MapOutput."""
        classes = self._values[mean.argmax(dim=0).to(torch.uint8).cpu().numpy()]
        nothing = ~covered.cpu().numpy()
        classes[nothing] = NO_CLASS
        if len(self.images) == 1:
            return [classes[None]]
        shares = mean.mul_(PERCENT).round_().clamp_(0, PERCENT).to(torch.uint8).cpu().numpy()
        shares[:, nothing] = NO_CLASS
        return [classes[None], shares]


class ValueMap:
    """The numbers of a finetuned regression per pixel."""

    def __init__(self, model: Maestro, target: Target) -> None:
        assert target.resolution_m is not None
        self._model, self._target = model, target
        self.resolution_m, self.num_channels = target.resolution_m, 1
        self.images: tuple[Image, ...] = (
            Image("", Bands((target.name,), "float32", float("nan"), units=target.units)),
        )

    def values(self, batch: Batch) -> Tensor | None:
        """As of MapOutput."""
        return self._model.predict(batch, self._target.name).values[:, None]

    def finish(self, mean: Tensor, covered: Tensor) -> list[np.ndarray]:
        """As of MapOutput."""
        return [_masked(mean, covered)]


class EmbeddingMap:
    """The tokens of a sensor, their mean over dates and band groups, on its token grid."""

    def __init__(self, model: Maestro, spec: DatasetSpec, sensor: str | None) -> None:
        names = [s.name for s in spec.sensors]
        wanted = sensor or spec.ref_sensor or names[0]
        if wanted not in names:
            raise InferenceError(f"--sensor {wanted}: the model reads {', '.join(names)}")
        self._model, self._sensor = model, wanted
        self.resolution_m = spec.crop_m / spec.sensor(wanted).grid
        self.num_channels = model.config.size.width
        bands = tuple(f"{wanted}_{i}" for i in range(self.num_channels))
        self.images: tuple[Image, ...] = (Image("", Bands(bands, "float32", float("nan"))),)

    def values(self, batch: Batch) -> Tensor | None:
        """As of MapOutput."""
        if self._sensor not in batch.pixels:
            return None
        tokens = self._model.embed(batch).tokens[self._sensor].mean(dim=1)
        side = round(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def finish(self, mean: Tensor, covered: Tensor) -> list[np.ndarray]:
        """As of MapOutput."""
        return [_masked(mean, covered)]


class TargetPoints:
    """What a finetuned model predicts of a whole window: a class, classes or a number."""

    def __init__(self, model: Maestro, target: Target) -> None:
        self._model, self._target = model, target

    def columns(self, batch: Batch) -> dict[str, tuple[pa.DataType, list[Any]]]:
        """As of PointOutput: ``class`` and ``p_<class>``; of several classes ``classes``, a list; of a regression
        ``value`` and its ``units``."""
        found = self._model.predict(batch, self._target.name)
        values = found.values.cpu().tolist()
        if found.kind == "regression":
            units = {"units": (pa.string(), [found.units] * len(values))} if found.units else {}
            return {"value": (pa.float32(), values), **units}
        assert found.probabilities is not None
        shares = found.probabilities.float().cpu().T.tolist()
        names = list(found.classes.values())
        columns: dict[str, tuple[pa.DataType, list[Any]]] = {}
        if found.kind == "multilabel":
            there = [[name for name, is_there in zip(names, row, strict=True) if is_there] for row in values]
            columns["classes"] = (pa.list_(pa.string()), there)
        else:
            columns["class"] = (pa.string(), [found.classes[value] for value in values])
        for name, share in zip(names, shares, strict=True):
            columns[f"p_{name}"] = (pa.float32(), share)
        return columns


class EmbeddingPoints:
    """A vector per window: the mean tokens of each sensor of ``spec``, concatenated in the model's order.

    A sensor that the tile lacks has the mean of the others, as in ``embed`` (``features.missing``).
    """

    def __init__(self, model: Maestro, spec: DatasetSpec) -> None:
        self._model = model
        there = {s.name for s in spec.sensors}
        names = [name for name in token_order(model, spec.name) if name in there]
        self._widths = dict.fromkeys(names, model.config.size.width)

    def columns(self, batch: Batch) -> dict[str, tuple[pa.DataType, list[Any]]]:
        """As of PointOutput: ``vector``."""
        tokens = self._model.embed(batch).tokens
        means = {name: grids.mean(dim=(1, 2)) for name, grids in tokens.items()}
        vectors = torch.cat(list(completed(means, self._widths).values()), dim=1).float().cpu()
        return {"vector": (pa.list_(pa.float32(), vectors.shape[1]), vectors.tolist())}


def resized(invalid: np.ndarray | None, side: int) -> np.ndarray | None:
    """(n, n) bool at ``side`` pixels per side: a pixel is invalid where the nearest one is."""
    if invalid is None or len(invalid) == side:
        return invalid
    index = ((np.arange(side) + 0.5) * len(invalid) / side).astype(np.int64)
    return invalid[index[:, None], index]


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of the same sensors as one."""
    if len(batches) == 1:
        return batches[0]
    first = batches[0]

    def cat(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return Batch(
        dataset=first.dataset,
        pixels=cat([b.pixels for b in batches]),
        dates=cat([b.dates for b in batches]),
        ref_date=torch.cat([b.ref_date for b in batches]),
        noise={},
        targets={},
        keys=tuple(key for b in batches for key in b.keys),
        tiles=tuple(key for b in batches for key in b.tiles),
    )


def _masked(mean: Tensor, covered: Tensor) -> np.ndarray:
    values: np.ndarray = mean.masked_fill_(~covered, float("nan")).cpu().numpy()
    return values
