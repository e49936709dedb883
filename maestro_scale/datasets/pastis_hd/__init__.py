"""PASTIS-HD: reader, splits and synthetic tiles."""
