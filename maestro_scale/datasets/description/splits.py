"""The tiles of a split: from lists, a column of a table, folders, or blocks of ground (blocks.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from maestro_scale.datasets.description.index import names_of
from maestro_scale.datasets.description.sections.splits import Splits
from maestro_scale.datasets.description.tables import Table, is_there, read_lines, stem
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten

WHOLE = "train"
"""The split of all tiles, if nothing says otherwise."""


def select(
    splits: Splits, src: str, split: str, found: Sequence[str], by_folder: bool
) -> tuple[list[str], str]:
    """The sorted keys of ``split``, and where they are listed, for messages.

    ``found``: keys that there are files of; ``by_folder``: whether ``{split}`` in patterns has selected them. A listed
    tile without files is kept, so that it is counted. DatasetError if there is no such split, or if it has no tiles.
    """
    if splits.lists is not None:
        path, listed = _from_lists(splits, src, split)
    elif splits.column is not None:
        path, listed = _from_column(splits, src, split)
    else:
        if (
            splits.blocks is None
            and not by_folder
            and split not in names_of(WHOLE, splits)
            and split != WHOLE
        ):
            raise DatasetError(
                f"the description has no splits, so all tiles are in {WHOLE!r}, none in {split!r}; add splits:"
            )
        return list(found), src
    if not listed:
        raise DatasetError(f"{path}: split {split!r} is empty; fetch the file again or choose another split")
    there = set(found)
    if not any(key in there for key in listed):
        stems = [stem(key) for key in listed]
        if not any(key in there for key in stems):
            raise DatasetError(
                f"{path}: none of its {len(listed)} tiles has files in {src}; it lists {shorten(listed[0])}, there are "
                f"files of {shorten(found[0]) if found else 'no tile'}; name the column with the keys, or fix the "
                "patterns"
            )
        listed = stems
    twice = [key for key, num in Counter(listed).items() if num > 1]
    if twice:
        raise DatasetError(
            f"{path}: names {len(twice)} tiles twice, first {shorten(twice[0])}; remove the repeats"
        )
    return sorted(listed), path


def _from_lists(splits: Splits, src: str, split: str) -> tuple[str, list[str]]:
    assert splits.lists is not None
    names = names_of(split, splits)
    paths = [remote.join(src, splits.lists.file.replace("{split}", name)) for name in names]
    path = next((p for p in paths if is_there(p)), None)
    if path is None:
        raise DatasetError(
            f"{paths[0]}: is missing, so there is no split {split!r}; the description says lists: {splits.lists.file}"
        )
    if path.endswith((".csv", ".parquet")):
        table = Table.read(path)
        return path, [key for key in table.column(splits.lists.column) if key]
    return path, read_lines(path)


def _from_column(splits: Splits, src: str, split: str) -> tuple[str, list[str]]:
    assert splits.column is not None
    section, names = splits.column, set(names_of(split, splits))
    path = remote.join(src, section.file)
    table = Table.read(path)
    words = table.column(section.column)
    keys = [key for key, word in zip(table.column(section.key), words, strict=True) if word in names and key]
    if not keys:
        there = ", ".join(shorten(w) for w in sorted(set(words))[:8])
        raise DatasetError(
            f"{path}: column {section.column!r} has no {split!r} but {there}; say what it is called: "
            f"splits.names.{split}"
        )
    return path, keys
