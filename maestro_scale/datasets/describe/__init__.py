"""A first draft of the description of a folder: what was found in it, and what is assumed.

:func:`describe` lists files (:mod:`files`), finds the patterns of their names (:mod:`names`), opens some of each kind
(:mod:`probe`, :mod:`labels`), guesses what they are (:mod:`rasters`, :mod:`inspection`), proposes sizes (:mod:`sizes`)
and writes YAML (:mod:`draft`). It is deterministic: the same files give the same text.
"""

from __future__ import annotations

from collections.abc import Callable

from maestro_scale.datasets.describe.draft import Draft
from maestro_scale.datasets.describe.inspection import inspect

__all__ = ["Draft", "describe"]


def describe(src: str, blocks: bool = False, say: Callable[[str], None] = lambda message: None) -> Draft:
    """The draft of a description of a folder, an address, or a single file.

    ``blocks``: with splits by blocks of ground, instead of one split. ``say``: receives a line for each file that
    cannot be read. DatasetError (one line) if ``src`` holds nothing that can be described.
    """
    draft = inspect(src, blocks)
    for message in draft.messages:
        say(message)
    return draft
