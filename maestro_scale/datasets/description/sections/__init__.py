"""The sections of a description."""
