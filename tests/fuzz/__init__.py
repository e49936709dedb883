"""Fuzzing of everything that reads data from outside: ``python -m tests.fuzz TARGET --seconds N``."""
