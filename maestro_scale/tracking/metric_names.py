"""Mapping from the fields of metrics.jsonl to MLflow metric names, grouped by prefix (``loss/``, ``speed/``, …)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maestro_scale.datasets.sensor_sets import split_name

_GROUPS = {
    "optim": ("lr", "grad_norm", "skipped_steps"),
    "speed": ("samples_per_s", "tokens_per_s", "step_s", "tflops", "mfu"),
    "data": ("epoch", "samples", "data_wait_s"),
    "system": ("peak_memory_gib",),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_BY_DATASET = ("loss", "explained")  # prefixes
_EXCLUDED = frozenset({"step", "dataset"})  # MLflow's x-axis; the dataset is part of the loss names


def metric_names(record: Mapping[str, Any], mixture: bool) -> dict[str, float | None]:
    """Metrics ``loss/total``, ``loss/<sensor>``, ``optim/lr``, ``speed/samples_per_s`` … of a line of metrics.jsonl.

    In a mixture the losses are ``loss/<dataset>/total`` and ``loss/<dataset>/<sensor>``, and ``explained`` likewise:
    each step is of one dataset, and a single curve would jump between them. So do those of tiles that lack sensors, in
    any run: ``loss/<dataset>.without.<sensor>/total``. A field that has a prefix keeps it; an unknown one goes to
    ``other/``.
    """
    name, absent = split_name(record["dataset"])
    # MLflow allows no '#', '~' and '+'.
    parts = (name.replace("#", "."), *(["without", *absent] if absent else []))
    dataset = ".".join(parts) + "/" if mixture or absent else ""
    return {_name(k, dataset): v for k, v in record.items() if k not in _EXCLUDED}


def _name(name: str, dataset: str) -> str:
    if name == "loss":
        return f"loss/{dataset}total"
    prefix, _, rest = name.partition("/")
    if rest:
        return f"{prefix}/{dataset}{rest}" if prefix in _BY_DATASET else name
    return f"{_GROUP_OF.get(name, 'other')}/{name}"
