"""Classifiers on frozen features: nearest neighbours and linear probes, per tile and per pixel."""
