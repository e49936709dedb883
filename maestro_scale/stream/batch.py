"""The batch: the input of the model, with all random numbers that the model uses.

Shapes: B samples, D dates, C bands, H×W pixels, L tokens per date, G token groups.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_scale.datasets.spec import Sensor

# Candidates of the structural mask per sample: the first that leaves a token visible is used (model/masking.py).
NUM_REDRAWS = 8


def num_noise(sensor: Sensor) -> int:
    """Uniform numbers per sample for one sensor: D·L·G for its tokens, then, per candidate of the structural mask, one
    for the modality, D for dates, L for locations and G for band groups.

    G is the largest number of token groups, whether the model uses them or not, so that the noise, and with it the
    batch, does not depend on the model."""
    cells, groups = sensor.grid**2, sensor.max_token_groups
    return sensor.num_dates * cells * groups + NUM_REDRAWS * (1 + sensor.num_dates + cells + groups)


@dataclass
class Batch:
    """Samples of one dataset.

    ``pixels[sensor]``: (B, D, C, H, W), native dtype, unscaled, cropped and flipped, before the model's
    resize. ``dates[sensor]``: (B, D, 3) int16 of year, day of year, hour. ``ref_date``: (B, 3) int16.
    ``noise[sensor]``: (B, num_noise(sensor)) float32 in [0, 1). ``targets[name]``: stacked targets. ``keys``:
    "epoch/dataset/sample" of each sample, enough to replay it (evaluation: "eval/dataset/sample/crop").
    ``tiles``: tile names. ``num_repeated_dates``: dates that were repeated or imputed.
    ``num_replaced_samples``: samples drawn in place of one in a bad shard. ``places``: location of each tile as stored,
    for ``shards.format.codec.parse_place`` (pretraining does not parse it); None where it is not known.
    ``nodata[sensor]``: (B, D, L) bool, patches with an invalid pixel, of sensors whose raster stores nodata: they do
    not count in the loss.
    ``block``: (bytes,) uint8, the memory that the tensors are views of, where they were made in one block (see
    ``stream/packing.py``).
    """

    dataset: str
    pixels: dict[str, Tensor]
    dates: dict[str, Tensor]
    ref_date: Tensor
    noise: dict[str, Tensor]
    targets: dict[str, Tensor]
    keys: tuple[str, ...]
    tiles: tuple[str, ...] = ()
    num_repeated_dates: int = 0
    num_replaced_samples: int = 0
    places: tuple[str | None, ...] = ()
    nodata: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    block: Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor."""
        parts = (self.pixels, self.dates, self.noise, self.targets, self.nodata)
        return (*(t for part in parts for t in part.values()), self.ref_date)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with ``fn`` applied to every tensor."""

        def map_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: fn(tensor) for name, tensor in tensors.items()}

        return dataclasses.replace(
            self,
            pixels=map_dict(self.pixels),
            dates=map_dict(self.dates),
            noise=map_dict(self.noise),
            targets=map_dict(self.targets),
            nodata=map_dict(self.nodata),
            ref_date=fn(self.ref_date),
            block=None,
        )

    def first(self) -> Batch:
        """A batch of the first sample only."""
        sample = self.map(lambda t: t[:1])
        return dataclasses.replace(sample, keys=self.keys[:1], tiles=self.tiles[:1], places=self.places[:1])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Every tensor on ``device``, dtypes unchanged: one copy where all are views of ``block``, else one per tensor.

        The result has the copied block. The copy is asynchronous only if it is ``non_blocking`` from pinned memory.
        """
        block = self.block
        # Checked, because a caller may have replaced tensors: those of the block would be copied in their place.
        if block is None or not all(_is_in(block, t) for t in self.tensors):
            return self.map(lambda t: t.to(device, non_blocking=non_blocking))
        moved = block.to(device, non_blocking=non_blocking)
        if moved is block:
            return self

        def view(tensor: Tensor) -> Tensor:
            start = tensor.storage_offset() * tensor.element_size() - block.storage_offset()
            return moved[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

        return dataclasses.replace(self.map(view), block=moved)


def _is_in(block: Tensor, tensor: Tensor) -> bool:
    """Whether the values are a range of bytes of the block."""
    # The address of the storage, not of its data: that is 0 for all tensors on the meta device.
    return tensor.is_contiguous() and tensor.untyped_storage()._cdata == block.untyped_storage()._cdata


_DICT_FIELDS = ("pixels", "dates", "noise", "targets", "nodata")


def digest(batch: Batch) -> str:
    """sha256 over every tensor and key of a batch, for audit files."""
    sha = hashlib.sha256("\n".join(batch.keys).encode())
    for part in _DICT_FIELDS:
        for name, tensor in sorted(getattr(batch, part).items()):
            sha.update(f"{part}/{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
    sha.update(batch.ref_date.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()
