"""TreeSatAI-TS: reader, splits and synthetic tiles."""
