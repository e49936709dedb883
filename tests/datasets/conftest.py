"""Fixtures: hand-written raw tiles of each dataset."""

from testkit.flair_tile import write_flair
from testkit.pastis_tile import write_pastis
from testkit.s2_naip_tile import write_naip
from testkit.treesatai_tile import write_tile

__all__ = ["write_flair", "write_naip", "write_pastis", "write_tile"]
