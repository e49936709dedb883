"""A first draft of the description of a folder: what was found in it, and what is assumed.

:func:`describe` lists files (:mod:`files`), finds the patterns of their names (:mod:`names`), opens some of each kind
(:mod:`probe`, :mod:`labels`), guesses what they are (:mod:`rasters`, :mod:`inspection`), proposes sizes (:mod:`sizes`)
and writes YAML (:mod:`draft`). It is deterministic: the same files give the same text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from maestro_scale.datasets.describe.inspection import Inspection
from maestro_scale.datasets.spec import DatasetError

__all__ = ["describe"]


def describe(src: str, blocks: bool = False, say: Callable[[str], None] = lambda message: None) -> str:
    """The draft of a description of ``src``, as YAML with comments.

    ``blocks``: with splits by blocks of ground, instead of one split. ``say``: receives a line for each file that
    cannot be read. DatasetError (one line) if ``src`` holds nothing that can be described.
    """
    folder = Path(src)
    if not folder.is_dir():
        raise DatasetError(f"{src}: is not a folder; check the path")
    draft = Inspection(folder, blocks).draft()
    for message in draft.messages:
        say(message)
    return draft.to_yaml()
