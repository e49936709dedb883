"""Tiles cut from rasters that are larger than a tile: one common grid, exact windows, warping, series of scenes."""
