"""Names of sub-datasets: the tiles of a dataset that lack certain sensors.

``flair_hub~s1_asc+s1_des`` are the tiles of ``flair_hub`` without the sensors ``s1_asc`` and ``s1_des``; read ``~`` as
"without". Names of datasets and sensors contain neither ``~`` nor ``+`` (:func:`.spec_limits.name_problem`).
"""

from __future__ import annotations

from collections.abc import Sequence


def without(dataset: str, absent: Sequence[str]) -> str:
    """The name of the tiles of ``dataset`` that lack the sensors ``absent``; that of the dataset if they lack none."""
    return f"{dataset}~{'+'.join(absent)}" if absent else dataset


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """The inverse of :func:`without`: (dataset, sensors that the tiles lack)."""
    dataset, _, absent = name.partition("~")
    return dataset, tuple(absent.split("+")) if absent else ()
