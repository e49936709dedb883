"""The hand-written tiles are fixtures of every test here."""

from testkit.pastis_tile import write_pastis
from testkit.s2_naip_tile import write_naip
from testkit.treesatai_tile import write_tile

__all__ = ["write_naip", "write_pastis", "write_tile"]
