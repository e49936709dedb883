"""What an inspection has found so far: the files, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from maestro_scale.datasets.describe import labels
from maestro_scale.datasets.describe.draft import TargetDraft
from maestro_scale.datasets.describe.files import Listing, local_copy
from maestro_scale.datasets.describe.names import Family
from maestro_scale.datasets.describe.probe import Prober
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.spec import DatasetError

_T = TypeVar("_T")


@dataclass
class Findings:
    """Filled in step by step. ``remarks`` and ``messages``: as in a draft. ``label_families``: raster files that are
    labels. ``used``: paths that later steps leave out."""

    listing: Listing
    prober: Prober
    remarks: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    targets: list[TargetDraft] = field(default_factory=list)
    label_families: list[Family] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @property
    def src(self) -> str:
        """The folder or address."""
        return self.listing.src

    def read(self, reader: Callable[..., _T | str], path: str, *more: object) -> _T | str:
        """What a reader of :mod:`labels` finds in a file, or why it cannot be read."""
        try:
            return reader(local_copy(self.src, path), path, *more)
        except DatasetError as error:
            return str(error)

    def list_keys(self, path: str) -> list[str]:
        """The keys in a list of tiles."""
        return labels.list_keys(local_copy(self.src, path))

    def is_geoparquet(self, path: str) -> bool:
        """Whether a Parquet file has geometries."""
        with remote.open_binary(remote.join(self.src, path)) as file:
            return labels.is_geoparquet(file)
