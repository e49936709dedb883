"""Datasets described in YAML: which files hold which raster, target and split, and how they become tiles."""
