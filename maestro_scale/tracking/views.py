"""Saved views of an experiment in MLflow's pages: tables and charts, kept as experiment tags with fixed ids.

The page of an experiment saves a view as the tag ``mlflow.sharedViewState.<id>`` and opens it by the parameter
``viewStateShareKey=<id>``. Its value is the envelope that *Save as new view* writes: ``{"name", "createdAt",
"updatedAt", "state"}``, times in milliseconds, with the state of the page as JSON text, plain or as ``deflate;`` and
base64 (``mlflow/server/js/src/experiment-tracking``, ``saveSharedView`` and ``ExperimentPageUIState``; read from the
pages of release 3.17). Releases without saved views ignore the tags.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from maestro_scale import untrusted
from maestro_scale.tracking.metric_names import GLANCE

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

TAG_PREFIX = "mlflow.sharedViewState."
RUNS = "maestro-runs"  # the view that the dashboard opens
_MAX_RUNS = 200  # whose metrics are searched
_MAX_KEYS = 20  # curves of a chart
_MAX_VALUE = 5000  # of an experiment tag in MLflow 3.0

_RECIPE_COLUMNS = (
    "model.size",
    "model.fusion",
    "model.target",
    "masking.ratio",
    "optim.base_lr",
    "optim.weight_decay",
    "optim.warmup",
    "train.steps",
    "train.global_batch",
    "train.precision",
    "data.mixture_0_.dataset",
    "seed",
)
_TAG_COLUMNS = ("dataset", "size", "device", "gpu", "ranks", "precision")
_EVALUATION_COLUMNS = ("benchmark", "mode", "fraction", "seeds", "step")


@dataclass(frozen=True)
class View:
    """A saved view. ``id``: of its tag and link; ``charts``: whether it shows charts instead of a table; ``state``: of
    the page."""

    id: str
    name: str
    charts: bool
    state: dict[str, Any]

    def link(self, address: str, experiment_id: str) -> str:
        """Its address on the server at ``address``. MLflow starts with its pages for language models; the link leaves
        them."""
        query = {"viewStateShareKey": self.id, "workflowType": "machine_learning"}
        query |= {"compareRunsMode": "CHART"} if self.charts else {}
        return f"{address}/#/experiments/{experiment_id}/runs?{urlencode(query)}"


def build_views(metrics: Iterable[str], params: Iterable[str]) -> list[View]:
    """The views of an experiment whose runs have these metrics and parameters."""
    names, known = sorted(set(metrics)), set(params)

    def like(*patterns: str) -> list[str]:
        return [n for p in patterns for n in names if re.fullmatch(p, n)][:_MAX_KEYS]

    scores = like(rf"{GLANCE}/score_.*")
    glance = [*like(rf"{GLANCE}/loss.*"), *scores, *like(rf"{GLANCE}/samples_per_s")]
    training = [
        ("loss", like(rf"{GLANCE}/loss.*")),
        ("loss by sensor", [n for n in like("loss/.*") if not n.endswith("/total")]),
        ("explained variance by sensor", like("explained/.*")),
        ("learning rate", like("optim/lr")),
        ("gradient norm", like("optim/grad_norm")),
    ]
    speed = [
        ("samples per second", like("speed/samples_per_s")),
        ("model FLOP utilisation", like("speed/mfu", "speed/tflops")),
        ("seconds of a step, and waiting for data", like("speed/step_s", "speed/data_wait_s")),
        ("memory of the device, GiB", like("system/peak_memory_gib", "system/.*/gpu.*memory.*")),
        ("memory of the nodes, GiB", like("system/.*/memory_gib")),
    ]
    of_runs = like(r"eval/[^/]+", "eval/(?!class/)[^/]+")
    of_runs = [n for n in dict.fromkeys(of_runs) if not n.endswith(("_low", "_high", "_deviation", "_s"))]
    over_steps = like("eval/(?!class/).+/.+", "eval/(knn|probe|validation)")
    evaluations = [_line("scores of the encoder by step", over_steps, "evaluations")] if over_steps else []
    evaluations += [_bar(f"{n.removeprefix('eval/')} by evaluation", n) for n in of_runs]
    evaluations += [_scatter(f"{n.removeprefix('eval/')} by fraction of the labels", n) for n in of_runs]
    return [
        View(RUNS, "Runs", False, _table(_columns(metrics=glance, tags=_TAG_COLUMNS))),
        View("maestro-training", "Training", True, _charts("training", _lines(training, "training"), glance)),
        View("maestro-speed", "Speed", True, _charts("speed", _lines(speed, "speed"), like("speed/.*"))),
        View(
            "maestro-evaluations",
            "Evaluations",
            True,
            _charts("evaluations", evaluations, [*scores, *of_runs], _EVALUATION_COLUMNS),
        ),
        View(
            "maestro-recipes",
            "Compare recipes",
            False,
            _table(_columns(params=[p for p in _RECIPE_COLUMNS if p in known or not known], metrics=glance)),
        ),
    ]


def write_views(client: MlflowClient, experiment_id: str) -> list[View]:
    """Store the views of an experiment, for the metrics that its runs have; returns them. A view that a user has saved
    again stays as it is. Raises any MLflow error."""
    runs = client.search_runs([experiment_id], max_results=_MAX_RUNS)
    views = build_views(
        {name for run in runs for name in run.data.metrics},
        {name for run in runs for name in run.data.params},
    )
    tags = client.get_experiment(experiment_id).tags
    for view in views:
        stored, value = tags.get(TAG_PREFIX + view.id), encode(view, round(1000 * time.time()))
        if stored is not None:
            envelope = _read(stored)
            if envelope.get("updatedAt") != envelope.get("createdAt") or envelope.get("state") == _state(
                view
            ):
                continue
        if len(value) <= _MAX_VALUE:
            client.set_experiment_tag(experiment_id, TAG_PREFIX + view.id, value)
        else:
            log.warning("the view %s has too many charts for a tag of MLflow", view.name)
    return views


def encode(view: View, time_ms: int) -> str:
    """The value of the tag of a view."""
    envelope = {"name": view.name, "createdAt": time_ms, "updatedAt": time_ms, "state": _state(view)}
    return json.dumps(envelope, separators=(",", ":"))


def _state(view: View) -> str:
    text = json.dumps(view.state, separators=(",", ":"))
    return "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _read(value: str) -> dict[str, Any]:
    try:
        envelope = untrusted.load_json(value)
    except untrusted.InputError:
        return {}
    return envelope if isinstance(envelope, dict) else {}


def _columns(params: Iterable[str] = (), metrics: Iterable[str] = (), tags: Iterable[str] = ()) -> list[str]:
    groups = {"metrics": metrics, "params": params, "tags": tags}
    # MLflow's own name of a column: its kind, and its key in backquotes.
    return ["attributes.`Duration`", *(f"{kind}.`{key}`" for kind, keys in groups.items() for key in keys)]


def _table(columns: Sequence[str]) -> dict[str, Any]:
    # What is left out has its default.
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "lifecycleFilter": "Active",
        "selectedColumns": list(columns),
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
    }


def _charts(
    section: str, charts: Sequence[dict[str, Any]], metrics: Sequence[str], params: Sequence[str] = ()
) -> dict[str, Any]:
    # The page adds charts of all other metrics, in sections of their prefixes; these are closed.
    prefixes = (GLANCE, "eval", "eval/class", "explained", "loss", "optim", "speed", "stream", "other")
    closed = [*(p for p in prefixes if p != section), "Model metrics", "System metrics"]
    sections = [_section(section, True), *(_section(name, False) for name in closed)]
    if section == "speed":  # the name of a prefix too: the page puts its charts below ours
        sections[0]["name"] = "speed "
        sections.insert(1, _section("speed", False) | {"uuid": "maestro-prefix-speed"})
    return {
        **_table(_columns(params=params, metrics=metrics)),
        "compareRunCharts": list(charts),
        "compareRunSections": sections,
        "isAccordionReordered": True,
    }


def _section(name: str, is_open: bool) -> dict[str, Any]:
    return {"uuid": f"maestro-{name}", "name": name, "display": is_open, "isReordered": False}


def _lines(charts: Iterable[tuple[str, list[str]]], section: str) -> list[dict[str, Any]]:
    return [_line(title, keys, section) for title, keys in charts if keys]


def _line(title: str, keys: Sequence[str], section: str) -> dict[str, Any]:
    return _chart("LINE", title, section) | {
        "metricKey": keys[0],
        "selectedMetricKeys": list(keys),
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "selectedXAxisMetricKey": "",
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _bar(title: str, key: str) -> dict[str, Any]:
    return _chart("BAR", title, "evaluations") | {"metricKey": key, "runsCountToCompare": 20}


def _scatter(title: str, key: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": "fraction", "type": "PARAM"}, "yaxis": {"key": key, "type": "METRIC"}}
    return _chart("SCATTER", title, "evaluations") | axes | {"runsCountToCompare": 100}


def _chart(kind: str, title: str, section: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"maestro-{section}-{title}",
        "metricSectionId": f"maestro-{section}",
        "displayName": title,
        "isGenerated": False,
        "deleted": False,
    }
