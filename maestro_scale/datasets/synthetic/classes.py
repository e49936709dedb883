"""The 20 classes of synthetic scenes: which sensor, or which two sensors together, separates them.

A class has one or two *variants*; a tile draws one variant for each of its classes. A variant consists of a family
(leaf spectrum), a season (course of greenness), a texture (period of rows or crowns) and a radar structure (ratio of VH
to VV). Only some of the four differ between the classes of a block:

| classes | family | season | texture | radar | separable by |
|---|---|---|---|---|---|
| 0–4 | broadleaf | 0–4 | medium | open | season only: an optical or a radar series |
| 5, 6 | shrub | 1 | fine, coarse | open | texture only: aerial, SPOT, NAIP |
| 7, 8 | shrub | 3 | medium | open, dense | radar only: ratio of VH to VV |
| 9, 10 | woody | {0, 4} | medium | {open, dense} | season and radar together |
| 11, 12 | woody | {1, 3} | {fine, coarse} | open | season and texture together |
| 13, 14 | conifer | evergreen | fine, coarse | open, dense | texture or radar |
| 15 | broadleaf | two seasons | medium | open | season only |
| 16, 17 | conifer | evergreen | fine, coarse | dense, open | among 13–17: texture and radar together |
| 18, 19 | shrub | 2, 4 | medium | open | season only |

Pairs in braces are exclusive ors: class 9 is (season 0, open) or (season 4, dense), class 10 is (season 0, dense) or
(season 4, open), equally often. The season of a tile says nothing about 9 against 10, nor does the radar structure;
both together determine it. The seasons of these pairs are equal in an aerial image of mid-June, and the backscatter of
woody plants does not follow their leaves, so that neither image nor radar contains the season. SPOT images of PASTIS-HD
are of 1 July, when seasons 1 and 3 differ: there one image separates 11 from 12.
"""

from __future__ import annotations

from dataclasses import dataclass

BROADLEAF, SHRUB, WOODY, CONIFER = range(4)
EVERGREEN, TWO_SEASONS = 5, 6  # after the five shifted seasons
FINE, MEDIUM, COARSE = range(3)
OPEN, DENSE = range(2)


@dataclass(frozen=True)
class Variant:
    """One appearance of class ``label``. The other fields are indices into the tables of the sensors' modules."""

    label: int
    family: int
    season: int
    texture: int = MEDIUM
    structure: int = OPEN


VARIANTS = (
    *(Variant(k, BROADLEAF, k) for k in range(5)),
    Variant(5, SHRUB, 1, FINE),
    Variant(6, SHRUB, 1, COARSE),
    Variant(7, SHRUB, 3, MEDIUM, OPEN),
    Variant(8, SHRUB, 3, MEDIUM, DENSE),
    Variant(9, WOODY, 0, MEDIUM, OPEN),
    Variant(9, WOODY, 4, MEDIUM, DENSE),
    Variant(10, WOODY, 0, MEDIUM, DENSE),
    Variant(10, WOODY, 4, MEDIUM, OPEN),
    Variant(11, WOODY, 1, FINE),
    Variant(11, WOODY, 3, COARSE),
    Variant(12, WOODY, 1, COARSE),
    Variant(12, WOODY, 3, FINE),
    Variant(13, CONIFER, EVERGREEN, FINE, OPEN),
    Variant(14, CONIFER, EVERGREEN, COARSE, DENSE),
    Variant(15, BROADLEAF, TWO_SEASONS),
    Variant(16, CONIFER, EVERGREEN, FINE, DENSE),
    Variant(17, CONIFER, EVERGREEN, COARSE, OPEN),
    Variant(18, SHRUB, 2),
    Variant(19, SHRUB, 4),
)
NUM_CLASSES = 1 + max(v.label for v in VARIANTS)


def variants_of(num_classes: int) -> tuple[Variant, ...]:
    """The variants of the first ``num_classes`` classes; ValueError if there are not as many."""
    if not 1 <= num_classes <= NUM_CLASSES:
        raise ValueError(
            f"num_classes is {num_classes}; scenes have signatures for 1 to {NUM_CLASSES} classes"
        )
    return tuple(v for v in VARIANTS if v.label < num_classes)
