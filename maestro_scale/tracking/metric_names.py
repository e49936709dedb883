"""What of a line of metrics.jsonl becomes which MLflow metric: grouped by what they tell, so that charts are found."""

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
_NO_METRICS = frozenset({"step", "dataset"})  # MLflow's axis, and what the losses' names say


def metric_names(record: Mapping[str, Any], mixture: bool) -> dict[str, float | None]:
    """``loss/total``, ``loss/<sensor>``, ``optim/lr``, ``speed/samples_per_s`` …, from a line of metrics.jsonl.

    In a mixture the losses are ``loss/<dataset>/total`` and ``loss/<dataset>/<sensor>``, so that no chart jumps
    between datasets. A name that has a group keeps it; one of no known group goes to ``other/``.
    """
    loss = "loss"
    if mixture:
        loss += "/" + record["dataset"].replace("#", ".")  # MLflow allows no '#'
    return {_name(k, loss): v for k, v in record.items() if k not in _NO_METRICS}


def _name(name: str, loss: str) -> str:
    if name == "loss":
        return f"{loss}/total"
    if "/" in name:
        return re.sub(r"^loss/", f"{loss}/", name)
    return f"{_GROUP_OF.get(name, 'other')}/{name}"
