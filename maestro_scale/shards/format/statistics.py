"""Counts of classes and dates per sample.

The writer stores their sum in the index (key ``tally``), so that a summary of a dataset reads no samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from maestro_scale.datasets.spec import MISSING_CLASS, DatasetSpec
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.fields import dates_field, target_field

_CLASS, _DATE = "class", "date"
_VALUE, _MISSING = 0, 1  # indices that a regression is counted by
_DAYS_BEFORE_MONTH = np.array([0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334])


def count_sample(sample: Sample, spec: DatasetSpec) -> Counter[str]:
    """Counts of one sample, by ``class/<target>/<index>`` and ``date/<modality>/<month 1-12>``.

    Classes are counted once per sample for multilabel and classification targets and once per pixel for segmentation;
    of a regression the values and the missing values are counted.
    """
    counts: Counter[str] = Counter()
    for target in spec.targets:
        values = sample.array(target_field(target.name))
        if target.kind == "multilabel":
            for i in np.flatnonzero(values > target.threshold).tolist():
                counts[f"{_CLASS}/{target.name}/{i}"] = 1
        elif target.kind == "classification":
            counts[f"{_CLASS}/{target.name}/{int(values[0])}"] = 1
        else:
            if target.kind == "regression":
                values = np.where(np.isnan(values), _MISSING, _VALUE)
            for i, count in enumerate(np.bincount(values.reshape(-1)).tolist()):
                if count:
                    counts[f"{_CLASS}/{target.name}/{i}"] = count
    names = set(sample.names)
    for modality in spec.modalities:
        if modality.name not in names:  # the tile lacks it
            continue
        days = sample.array(dates_field(modality.name))[:, 1]
        # In leap years the last day of each month from February on counts as the next month: good enough here.
        months = np.searchsorted(_DAYS_BEFORE_MONTH, days, side="left")
        for month, count in enumerate(np.bincount(months, minlength=13).tolist()):
            if count:
                counts[f"{_DATE}/{modality.name}/{month}"] = count
    return counts


def parse_counts(
    totals: Mapping[str, int], spec: DatasetSpec
) -> tuple[dict[str, dict[str, int]], dict[str, tuple[int, ...]]]:
    """Summed counts as ``classes[target][class name]`` and ``months[modality]`` (January … December)."""
    classes: dict[str, dict[str, int]] = {}
    for target in spec.targets:
        names = {**dict(enumerate(target.classes)), **{i: f"ignored {i}" for i in target.ignored}}
        names |= {i: f"{n} (ignored)" for i, n in enumerate(target.classes) if i in target.ignored}
        if target.kind == "regression":
            names = {_VALUE: "value", _MISSING: "missing"}
        elif target.kind == "classification":
            names[MISSING_CLASS] = "missing"
        by_class = {name: totals.get(f"{_CLASS}/{target.name}/{i}", 0) for i, name in sorted(names.items())}
        classes[target.name] = by_class
    months = {
        m.name: tuple(totals.get(f"{_DATE}/{m.name}/{month}", 0) for month in range(1, 13))
        for m in spec.modalities
    }
    return classes, months
