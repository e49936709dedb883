"""The hand-written tile is a fixture of every test here."""

from testkit.treesatai_tile import write_tile

__all__ = ["write_tile"]
