"""Synthetic scenes and where synthetic datasets are written."""
