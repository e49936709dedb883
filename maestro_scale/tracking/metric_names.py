"""Mapping from the fields of metrics.jsonl to MLflow metric names, grouped by prefix (``loss/``, ``speed/``, …).

MLflow draws a section of charts per prefix, in alphabetical order. The section ``brief`` therefore comes first
and repeats the loss, the speed and the scores of the encoder; the counters of the loader, ``data/…`` in metrics.jsonl,
are ``stream/…`` and come last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maestro_scale.datasets.sensor_sets import split_name

BRIEF = "brief"
_GROUPS = {
    "optim": ("lr", "grad_norm", "skipped_steps"),
    "speed": ("samples_per_s", "tokens_per_s", "step_s", "data_wait_s", "tflops", "mfu"),
    "stream": ("epoch", "samples"),
    "system": ("peak_memory_gib",),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_RENAMED = {"data": "stream"}  # prefixes
_BY_DATASET = ("loss", "explained")  # prefixes
# MLflow's x-axes; the dataset is part of the loss names.
_EXCLUDED = frozenset({"step", "time", "dataset"})
_DELAY = "eval/delay_s"  # not a score


def metric_names(record: Mapping[str, Any], mixture: bool) -> dict[str, float | None]:
    """Metrics ``loss/total``, ``loss/<sensor>``, ``optim/lr``, ``speed/samples_per_s`` … of a line of metrics.jsonl.

    In a mixture the losses are ``loss/<dataset>/total`` and ``loss/<dataset>/<sensor>``, and ``explained`` likewise:
    each step is of one dataset, and a single curve would jump between them. So do those of tiles that lack sensors, in
    any run: ``loss/<dataset>.without.<sensor>/total``. A field that has a prefix keeps it, except ``data``; an unknown
    one goes to ``other/``.
    """
    # Finetunings of earlier revisions did not log the dataset.
    name, absent = split_name(record.get("dataset", ""))
    # MLflow allows no '#', '~' and '+'.
    parts = (name.replace("#", "."), *(["without", *absent] if absent else []))
    dataset = ".".join(parts) + "/" if name and (mixture or absent) else ""
    names = {_name(k, dataset): v for k, v in record.items() if k not in _EXCLUDED}
    return names | _brief(record, dataset)


def brief_score(name: str) -> str:
    """The name in the first section of the score ``eval/<name>``."""
    return f"{BRIEF}/score_{name.replace('/', '_')}"


def _brief(record: Mapping[str, Any], dataset: str) -> dict[str, float | None]:
    of_dataset = f"_{dataset.rstrip('/')}" if dataset else ""
    glance = {f"loss{of_dataset}": "loss", "samples_per_s": "samples_per_s"}
    scores = {
        brief_score(k.removeprefix("eval/")): v
        for k, v in record.items()
        if k.startswith("eval/") and k != _DELAY
    }
    return {f"{BRIEF}/{name}": record[key] for name, key in glance.items() if key in record} | scores


def _name(name: str, dataset: str) -> str:
    if name == "loss":
        return f"loss/{dataset}total"
    prefix, _, rest = name.partition("/")
    if rest:
        prefix = _RENAMED.get(prefix, prefix)
        return f"{prefix}/{dataset}{rest}" if prefix in _BY_DATASET else f"{prefix}/{rest}"
    return f"{_GROUP_OF.get(name, 'other')}/{name}"
