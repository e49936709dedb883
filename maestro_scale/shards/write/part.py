"""Parts of a split: several independent jobs write one split together, without communication.

Each job takes a fixed subset of the shards. The job that finds all shards finished publishes the manifest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from maestro_scale.shards.errors import WriteError

_PATTERN = re.compile(r"([1-9]\d*)/([1-9]\d*)")


@dataclass(frozen=True)
class WriterPart:
    """Part ``number`` (from 1) of ``count``: every ``count``-th shard, so that all parts take about the same time."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> WriterPart:
        """Parse ``i/n``, for example ``3/16``. WriteError if it does not have that form."""
        match = _PATTERN.fullmatch(text.strip())
        part = cls(*map(int, match.groups())) if match else None
        if part is None or part.number > part.count:
            raise WriteError(f"part {text!r} is not i/n with i from 1 to n, for example 3/16")
        return part

    def includes(self, shard: int) -> bool:
        """Whether the shard with this number belongs to this part."""
        return shard % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE_SPLIT = WriterPart()
