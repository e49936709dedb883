"""FLAIR#2: the 77,762 patches of FLAIR-HUB in the ``_flair2`` lists, without radar, 12 classes.

Reads the folders of FLAIR-HUB. The original release of FLAIR#2 has other folders and other label values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from maestro_scale.datasets.flair_hub import reader as flair_hub
from maestro_scale.datasets.flair_hub.classes import FLAIR2_IGNORED

_COSIA, *_OTHERS = flair_hub.FULL_SPEC.targets

FULL_SPEC = replace(
    flair_hub.FULL_SPEC,
    name="flair2",
    title="FLAIR#2",
    targets=(replace(_COSIA, ignored=FLAIR2_IGNORED), *_OTHERS),
)
SPEC = flair_hub.select(FULL_SPEC, ("aerial", "dem", "s2"))
FLAIR2 = flair_hub.Variant(
    FULL_SPEC,
    SPEC,
    ("{}_flair2.csv",),
    "split_flairchallenge",
    assumed="there is no list of FLAIR#2: split_flairchallenge of the metadata is taken",
)


def open_raw(src: Path, split: str, modalities: Sequence[str] | None = None) -> flair_hub.Reader:
    """The tiles of ``split`` (of ``{split}_flair2.csv``); otherwise as :func:`flair_hub.open_raw`."""
    return flair_hub.open_raw(src, split, modalities, FLAIR2)
