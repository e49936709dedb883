"""Documents that ship with the package (recipes, studies, descriptions of datasets), found by name.

A name is the path below the folder of the documents, without ``.yaml``: ``vitl``, ``eval/treesatai_ts``.
"""

from __future__ import annotations

import re
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FOLDERS = {"recipe": "recipes", "study": "recipes/study", "description": "descriptions"}
"""Kind of document → its folder in the repository, and below ``share/maestro_scale`` of an installation."""

_NAME = re.compile(r"\w[\w-]*(/\w[\w-]*)*")
_PACKAGE = Path(__file__).parents[1]


def folders(kind: str) -> list[Path]:
    """Existing folders with documents of ``kind``, in the order in which they are searched."""
    return [f for f in _candidates(FOLDERS[kind]) if f.is_dir()] if kind in FOLDERS else []


def find(kind: str, name: str) -> Path | None:
    """The document called ``name``; None if there is none."""
    if not _NAME.fullmatch(name):
        return None
    return next((path for f in folders(kind) if (path := f / f"{name}.yaml").is_file()), None)


def names(kind: str) -> list[str]:
    """The names of all documents of ``kind``, sorted: those of the folder itself first."""
    found = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in folders(kind)[:1]
        for path in folder.rglob("*.yaml")
    }
    return sorted(found, key=lambda name: (name.count("/"), name))


def _candidates(folder: str) -> Iterator[Path]:
    below = Path("share", "maestro_scale", folder)
    yield _PACKAGE.parent / folder  # a checkout
    yield _PACKAGE.parent / below  # pip install --target
    yield Path(sysconfig.get_path("data")) / below
    if (user := site.USER_BASE or site.getuserbase()) is not None:  # pip install --user
        yield Path(user) / below
