"""Hooks, called after each step: audit, pictures, log, records of skipped steps, garbage collection."""
