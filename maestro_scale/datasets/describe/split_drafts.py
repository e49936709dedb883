"""Splits that the names of files tell, or else a proposal by blocks of ground."""

from __future__ import annotations

import math
from collections.abc import Iterable

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.draft import Draft
from maestro_scale.datasets.spec import DatasetError

_BLOCKS = 40  # wanted number of blocks, of which splits are drawn


def propose_splits(draft: Draft, blocks: bool) -> None:
    """Set the splits, or a proposal for them; ``blocks``: the proposal is part of the description."""
    names: set[str] = set()
    for r in draft.rasters:
        if "{split}" in r.files and r.family is not None:
            names |= {part for f in r.family.files for part in _split_texts(r.files, f.path)}
    if names and draft.splits is None:
        other = split_names(names)
        draft.splits_note = f"found: the folders {', '.join(sorted(names))} are splits."
        if other:
            draft.splits = other
        return
    if draft.splits is not None:
        return
    if all(r.bounds is not None for r in draft.rasters):
        tiles = draft.num_tiles or max(len(r.keys) for r in draft.rasters)
        side = max(1, round(math.sqrt(tiles / _BLOCKS)))
        draft.blocks = {
            "size_m": side * draft.sizes.tile_m,
            "fractions": {"train": 0.7, "val": 0.15, "test": 0.15},
            # In small blocks nearly every train tile has a neighbour of another split.
            "distance_m": draft.sizes.tile_m if side >= 3 else 0,
        }
    if blocks:
        if draft.blocks is None:
            raise DatasetError(
                f"{draft.source}: the images have no coordinates, so no blocks of ground can be drawn; leave out "
                "--blocks"
            )
        draft.splits, draft.blocks = {"blocks": draft.blocks}, None
        draft.splits_note = (
            "assumed: blocks drawn at random; tiles nearer than distance_m to another split are left out"
        )


def split_names(found: Iterable[str]) -> dict[str, object]:
    """``names`` of a splits section, where splits are called otherwise than train, val and test."""
    names: dict[str, list[str]] = {}
    for text in sorted(found):
        names.setdefault(words.SPLITS[text.lower()], []).append(text)
    other = {split: texts for split, texts in names.items() if texts != [split]}
    return {"names": other} if other else {}


def _split_texts(pattern: str, path: str) -> list[str]:
    depth = pattern.split("/")
    return [part for wanted, part in zip(depth, path.split("/"), strict=False) if wanted == "{split}"]
