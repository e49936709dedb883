"""Mapping from the fields of metrics.jsonl to MLflow metric names, grouped by prefix (``loss/``, ``speed/``, …)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_GROUPS = {
    "optim": ("lr", "grad_norm", "skipped_steps"),
    "speed": ("samples_per_s", "tokens_per_s", "step_s", "tflops", "mfu"),
    "data": ("epoch", "samples", "data_wait_s"),
    "system": ("peak_memory_gib",),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_EXCLUDED = frozenset({"step", "dataset"})  # MLflow's x-axis; the dataset is part of the loss names


def metric_names(record: Mapping[str, Any], mixture: bool) -> dict[str, float | None]:
    """Metrics ``loss/total``, ``loss/<sensor>``, ``optim/lr``, ``speed/samples_per_s`` … of a line of metrics.jsonl.

    In a mixture the losses are ``loss/<dataset>/total`` and ``loss/<dataset>/<sensor>``: each step is of one dataset,
    and a single curve would jump between them. A field that has a prefix keeps it; an unknown one goes to ``other/``.
    """
    loss = "loss"
    if mixture:
        loss += "/" + record["dataset"].replace("#", ".")  # MLflow allows no '#'
    return {_name(k, loss): v for k, v in record.items() if k not in _EXCLUDED}


def _name(name: str, loss: str) -> str:
    if name == "loss":
        return f"{loss}/total"
    if "/" in name:
        return re.sub(r"^loss/", f"{loss}/", name)
    return f"{_GROUP_OF.get(name, 'other')}/{name}"
