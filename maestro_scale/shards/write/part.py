"""A share of the shards of a split, for jobs that write one split together without talking to each other."""

from __future__ import annotations

import re
from dataclasses import dataclass

from maestro_scale.shards.errors import WriteError

_TEXT = re.compile(r"([1-9]\d*)/([1-9]\d*)")


@dataclass(frozen=True)
class WriterPart:
    """WriterPart ``number`` (from 1) of ``count``; it takes every ``count``-th shard, so that all parts end alike."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> WriterPart:
        """From ``i/n``, e.g. ``3/16``; WriteError if it is no such thing."""
        match = _TEXT.fullmatch(text.strip())
        part = cls(*map(int, match.groups())) if match else None
        if part is None or part.number > part.count:
            raise WriteError(f"part {text!r} is not i/n with i from 1 to n, as 3/16")
        return part

    def includes(self, shard: int) -> bool:
        """Whether the shard with this number is for this part."""
        return shard % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE_SPLIT = WriterPart()
