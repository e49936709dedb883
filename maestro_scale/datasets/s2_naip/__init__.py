"""S2-NAIP urban: reader and synthetic tiles."""
