"""FLAIR-HUB and its variant FLAIR#2: reader, dates, metadata and synthetic tiles."""
