"""Frozen features: the encoders that make them and the folders that store them."""
