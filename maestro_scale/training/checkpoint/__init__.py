"""Checkpoints: staged, hashed, committed by one rename, mirrored, and read by any number of ranks."""
