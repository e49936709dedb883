"""Access to a stored sample, and the check of its fields against the spec before anything is decoded."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import numpy as np

from maestro_scale.datasets.spec import DatasetError, Modality
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format.compress import Window
from maestro_scale.shards.format.fields import (
    Layout,
    dates_field,
    dates_layout,
    mask_field,
    mask_layout,
    modality_layout,
    stored_dates,
)


class StoredSample(Protocol):
    """The access to a sample that transforms need (implemented by shards.format.codec.Sample).

    ``layout``: equal for samples whose fields have the same names, dtypes and shapes; weakly referable.
    """

    key: str

    @property
    def layout(self) -> Hashable: ...

    def array(self, name: str, window: Window | None = None) -> np.ndarray:
        """A field, or a window of its last two axes."""
        ...

    def rows(self, name: str, indices: np.ndarray, window: Window | None = None) -> np.ndarray:
        """Entries of a field's first axis, or a window of each; the others are not decoded."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a field."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a field."""
        ...


def check_modality(sample: StoredSample, modality: Modality) -> int:
    """The number of dates that a sample has of a modality, or a CodecError: the checks of `verify`, in its order."""
    name = modality.name
    try:
        stored = stored_dates(sample.key, modality, (sample.shape(name), modality.dtype))
    except (DatasetError, KeyError) as error:
        raise CodecError(str(error.args[0])) from None
    check_field(sample, name, modality_layout(modality, stored))
    check_field(sample, dates_field(name), dates_layout(stored))
    if modality.mask_bands:
        check_field(sample, mask_field(name), mask_layout(modality, stored))
    return stored


def check_field(sample: StoredSample, field: str, expected: Layout) -> None:
    """CodecError unless a field has this shape and dtype."""
    # Assigning to the batch would silently broadcast or cast an array of another shape or dtype.
    try:
        shape, dtype = sample.shape(field), sample.dtype(field)
    except KeyError as error:
        raise CodecError(str(error.args[0])) from None
    if (shape, dtype) != expected:
        raise CodecError(
            f"sample {sample.key}: {field} is {dtype} {shape}, but by the manifest's spec {expected[1]} "
            f"{expected[0]}"
        )
