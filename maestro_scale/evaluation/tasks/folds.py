"""Folds of cross-validation: the splits in shards that are train, val and test in each fold, by the splits' names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from maestro_scale.evaluation.results import EvaluationError

ROLES = ("train", "val", "test")

_PART = re.compile(r"fold_(\d+)")
_NAMED = (re.compile(r"split_(\d+)_(train|val|test)"), re.compile(r"(train|val|test)_rotation_(\d+)"))

Splits = Mapping[str, tuple[str, ...]]
"""Splits in shards by role."""


def find_folds(splits: Sequence[str]) -> dict[int, Splits]:
    """{number: {role: splits}} of every fold that ``splits`` are complete for.

    ``fold_1`` … ``fold_n`` are disjoint parts of the data, and a fold of cross-validation is a rotation of them: fold k
    takes the parts from k on, wrapping around; the last one is test, the one before val, the others train (PASTIS-HD's
    protocol). ``split_K_train`` (FLAIR-HUB) and ``train_rotation_K`` name fold and role; the first fold of those may
    also be called ``train``, ``val``, ``test``.
    """
    numbers = sorted(int(m[1]) for s in splits if (m := _PART.fullmatch(s)))
    if len(numbers) >= len(ROLES) and numbers == list(range(1, len(numbers) + 1)):
        return {k: _rotation(numbers, k) for k in numbers}
    found: dict[int, dict[str, tuple[str, ...]]] = {}
    for split in splits:
        for pattern in _NAMED:
            if match := pattern.fullmatch(split):
                role, number = sorted(match.groups(), key=str.isdigit)
                found.setdefault(int(number), {})[role] = (split,)
    if found and all(role in splits for role in ROLES):
        found.setdefault(1, {role: (role,) for role in ROLES})
    return {k: found[k] for k in sorted(found) if set(found[k]) == set(ROLES)}


def fold_splits(splits: Sequence[str], number: int) -> Splits:
    """{role: splits} of fold ``number``. EvaluationError, which lists the folds and splits, if it is incomplete."""
    folds = find_folds(splits)
    if number not in folds:
        raise EvaluationError(
            f"no fold {number} in these shards (folds: {', '.join(map(str, folds)) or 'none'}; splits: "
            f"{', '.join(splits)}): shard fold_1, fold_2, … or split_{number}_train, split_{number}_val, "
            f"split_{number}_test"
        )
    return folds[number]


def _rotation(parts: Sequence[int], number: int) -> Splits:
    *train, val, test = (f"fold_{parts[(number - 1 + i) % len(parts)]}" for i in range(len(parts)))
    return {"train": tuple(train), "val": (val,), "test": (test,)}
