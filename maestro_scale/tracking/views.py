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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from maestro_scale import untrusted
from maestro_scale.tracking.metric_names import BRIEF

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

TAG_PREFIX = "mlflow.sharedViewState."
RUNS = "maestro-runs"  # the view that the dashboard opens
PICTURE = "reconstruction"  # key of the pictures of a run
_HAS_PICTURES = "mlflow.loggedImages"
_MAX_RUNS = 200  # whose metrics are searched
_MAX_CHARTS = 20  # of a kind
_MIN_WIDTH = 120  # of a column: numbers of six digits
_FIRST_COLUMNS = {"attributes.`Run Name`": 260, "runDateAndNestInfo": 150, "duration": 90}
_PREFIXES = (BRIEF, "eval", "eval/class", "explained", "loss", "optim", "speed", "stream", "other")
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


def picture_steps(client: MlflowClient, run_id: str) -> set[int]:
    """Steps of which a run has a picture for the slider. Raises any MLflow error."""
    # MLflow's names: KEY+step+STEP+timestamp+…, before its release 3.10 with % instead of +.
    names = (PurePosixPath(a.path).name for a in client.list_artifacts(run_id, "images"))
    found = (re.match(rf"{PICTURE}[+%]step[+%](\d+)[+%].*\.png$", name) for name in names)
    return {int(match[1]) for match in found if match}


def build_views(metrics: Iterable[str], params: Iterable[str], picture_step: int | None = None) -> list[View]:
    """The views of an experiment whose runs have these metrics and parameters.

    ``picture_step``: step of the pictures that the slider shows first, which must have one; None: there are none.
    """
    names, known = sorted(set(metrics)), set(params)

    def like(*patterns: str) -> list[str]:
        return [n for p in patterns for n in names if re.fullmatch(p, n)][:_MAX_CHARTS]

    losses, scores = like(rf"{BRIEF}/loss.*"), like(rf"{BRIEF}/score_.*")
    whole = [n for n in scores if not re.search(r"_[\d.]+pct_", n)]  # of all training labels
    over_steps = like(r"eval/(?!class/).+/.+/[^/]+", "eval/(knn|probe|validation)")
    # Numbers of an evaluation, without intervals, deviations and seconds.
    of_runs = [n for n in like("eval/[^/]+") if not re.search("_(low|high|deviation|s)$", n)]
    # What tells runs apart comes before the scores, whose names are long.
    overview = {
        **_columns(metrics=losses, tags=("size", "device")),
        **_columns(metrics=[*whole, *like(f"{BRIEF}/samples_per_s")]),
        **_columns(tags=("dataset", "gpu", "ranks", "precision")),
    }
    training = {
        "loss": [_line(n) for n in losses],
        "scores of the encoder": [_line(n) for n in over_steps],
        # Without the parameters, which the page of a run shows over its pictures.
        "pictures": [
            _chart("IMAGE") | {"imageKeys": [PICTURE], "step": step, "showRunParams": False}
            for step in ([] if picture_step is None else [picture_step])
        ],
        "loss by sensor": [_line(n) for n in like("loss/.*") if not n.endswith("total")],
        "explained variance by sensor": [_line(n) for n in like("explained/.*")],
        "learning rate and gradient norm": [_line(n) for n in like("optim/lr", "optim/grad_norm")],
    }
    speed = {
        "samples per second, utilisation": [
            _line(n) for n in like("speed/samples_per_s", "speed/mfu", "speed/tflops")
        ],
        "seconds of a step, and waiting for data": [
            _line(n) for n in like("speed/step_s", "speed/data_wait_s")
        ],
        "memory, GiB": [_line(n) for n in like("system/peak_memory_gib", "system/.+/.*memory_gib")],
    }
    evaluations = {
        "by evaluation": [_bar(n) for n in of_runs],
        "by step of the checkpoint": [_scatter(n, "step") for n in of_runs],
        "by fraction of the labels": [_scatter(n, "fraction") for n in of_runs],
        "by mode": [_parallel(("mode", "fraction"), of_runs)] if of_runs else [],
    }
    # Ordered by another column than the start, evaluations are not nested below closed training runs.
    order = {"orderByKey": f"metrics.`{of_runs[0]}`"} if of_runs else {}
    of_evaluations = {"searchFilter": "tags.benchmark != ''", **order}
    recipe = [p for p in _RECIPE_COLUMNS if p in known or not known]
    return [
        View(RUNS, "Runs", False, _table(overview)),
        View("maestro-training", "Training", True, _table(overview) | _charts(training)),
        View("maestro-speed", "Speed", True, _table(_columns(metrics=like("speed/.*"))) | _charts(speed)),
        View(
            "maestro-evaluations",
            "Evaluations",
            True,
            _table(_columns(_EVALUATION_COLUMNS, of_runs)) | _charts(evaluations) | of_evaluations,
        ),
        View("maestro-recipes", "Compare recipes", False, _table(_columns(recipe, [*losses, *whole]))),
    ]


def write_views(client: MlflowClient, experiment_id: str) -> list[View]:
    """Store the views of an experiment, for the metrics that its runs have; returns them. A view that a user has saved
    again stays as it is. Raises any MLflow error."""
    runs = client.search_runs([experiment_id], max_results=_MAX_RUNS)  # the newest first
    with_pictures = (run.info.run_id for run in runs if _HAS_PICTURES in run.data.tags)
    steps = picture_steps(client, newest) if (newest := next(with_pictures, None)) else set()
    views = build_views(
        {name for run in runs for name in run.data.metrics},
        {name for run in runs for name in run.data.params},
        max(steps, default=None),
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


def _columns(
    params: Iterable[str] = (), metrics: Iterable[str] = (), tags: Iterable[str] = ()
) -> dict[str, int]:
    """Columns and their widths in pixels, which show the whole name."""
    groups = {"params": params, "metrics": metrics, "tags": tags}
    # MLflow's own name of a column: its kind, and its key in backquotes.
    return {
        f"{kind}.`{key}`": max(_MIN_WIDTH, 40 + round(7.5 * len(key)))
        for kind, keys in groups.items()
        for key in keys
    }


def _table(columns: Mapping[str, int]) -> dict[str, Any]:
    # What is left out has its default.
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "lifecycleFilter": "Active",
        "selectedColumns": ["attributes.`Duration`", *columns],
        "columnOrder": [*_FIRST_COLUMNS, *columns],
        "columnWidths": {**_FIRST_COLUMNS, **columns},
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
    }


def _charts(sections: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    # The page adds charts of all other metrics, in sections of their prefixes; these are closed.
    shown = [
        _section(name, True) | {"columns": _num_columns(charts)}
        for name, charts in sections.items()
        if charts
    ]
    closed = [_section(name, False) for name in (*_PREFIXES, "Model metrics", "System metrics")]
    return {
        "compareRunCharts": [
            chart | {"uuid": f"maestro-{name}-{number}", "metricSectionId": f"maestro-open-{name}"}
            for name, charts in sections.items()
            for number, chart in enumerate(charts)
        ],
        "compareRunSections": [*shown, *closed],
        "isAccordionReordered": True,
    }


def _section(name: str, is_open: bool) -> dict[str, Any]:
    uuid = f"maestro-{'open' if is_open else 'closed'}-{name}"
    return {"uuid": uuid, "name": name, "display": is_open, "isReordered": False}


def _num_columns(charts: Sequence[dict[str, Any]]) -> int:
    """Charts beside each other: the page cuts titles, which are the names of metrics."""
    longest = max(len(chart.get("metricKey", "")) for chart in charts)
    return min(len(charts), 3 if longest < 20 else 2)


def _line(key: str) -> dict[str, Any]:
    return _chart("LINE") | {
        "metricKey": key,
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


def _bar(key: str) -> dict[str, Any]:
    return _chart("BAR") | {"metricKey": key}


def _scatter(key: str, param: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": param, "type": "PARAM"}, "yaxis": {"key": key, "type": "METRIC"}}
    return _chart("SCATTER") | axes | {"runsCountToCompare": 100}


def _parallel(params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    chosen = {"selectedParams": list(params), "selectedMetrics": list(metrics[:3]), "showAllRuns": False}
    return _chart("PARALLEL") | chosen


def _chart(kind: str) -> dict[str, Any]:
    return {"type": kind, "runsCountToCompare": 20, "isGenerated": False, "deleted": False}
