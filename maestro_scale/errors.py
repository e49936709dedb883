"""The base class of all expected errors."""

from __future__ import annotations


class MaestroError(Exception):
    """Bad input or a bad environment: a user's mistake, not a bug.

    The message is one line: what is wrong, where, and what to do. Entry points print it and exit with
    ``entry.USAGE``; anything that is not a MaestroError ends in a traceback.
    """
