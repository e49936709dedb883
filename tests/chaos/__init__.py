"""Fault injection with real processes and sockets: ``python -m tests.chaos --minutes M --seed S``."""
