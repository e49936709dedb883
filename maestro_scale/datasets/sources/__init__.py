"""Storage formats of imagery: one module per format behind one protocol (protocol.py)."""
