"""Encoders that MAESTRO is compared with: one protocol (``protocol.py``), found by name (``registry.py``)."""
