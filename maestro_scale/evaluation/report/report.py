"""Write a report: results next to the published tables, as one self-contained HTML file and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maestro_scale import untrusted
from maestro_scale.escaping import link_target
from maestro_scale.evaluation.metric_kinds import METRIC_KINDS
from maestro_scale.evaluation.probes.dense import IGNORED
from maestro_scale.evaluation.report import charts
from maestro_scale.evaluation.report.differences import difference_rows
from maestro_scale.evaluation.report.groups import ResultFile, ResultGroup, data_key, group_results
from maestro_scale.evaluation.report.pages import data_url, html_templates, markdown_templates
from maestro_scale.evaluation.report.tables import (
    benchmark_key,
    build_tables,
    curve_key,
    oracle_score,
    score_text,
)
from maestro_scale.evaluation.results import MAPS, EvaluationError
from maestro_scale.training.run_dir import write_atomically

_PACKAGE = "maestro_scale.evaluation.report"
_MAX_MAPS = 64
_MAX_BARS = 5  # encoders in a chart of scores per class


def write_report(results: Sequence[ResultFile], out: Path) -> tuple[Path, Path]:
    """Write ``out`` (self-contained HTML) and the tables as ``.md`` next to it; returns both paths. EvaluationError
    where ``out`` is not the name of an HTML file, or the maps of a result cannot be read."""
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise EvaluationError(
            f"--out {out}: name an .html file; its tables are written to .md with the same name"
        )
    groups = group_results(results)
    content: dict[str, Any] = {
        "tables": build_tables(groups),
        "oracle": lambda group: oracle_score(group, groups),
        "score_text": score_text,
        "curves": _curves(groups),
        "data": data_key,
        "benchmarks": _benchmarks(groups),
        "metric": {name: kind.title for name, kind in METRIC_KINDS.items()},
        "where": lambda path: _relative(path, out),
        "link": lambda path: link_target(_relative(path, out)),
        "recipe": lambda recipe: yaml.safe_dump(recipe, sort_keys=False, width=110),
    }
    page = html_templates(_PACKAGE).get_template("report.html").render(content)
    text = markdown_templates(_PACKAGE).get_template("report.md").render(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    write_atomically(out.with_suffix(".md"), text)
    return out, out.with_suffix(".md")


def _curves(groups: Sequence[ResultGroup]) -> dict[str, str]:
    """{benchmark: chart as a data URL} where an encoder was scored on more than one fraction of the labels."""
    charts_by_benchmark = {}
    for benchmark, members in _by_benchmark(groups).items():
        by_encoder: dict[tuple[object, ...], list[ResultGroup]] = defaultdict(list)
        for group in members:
            by_encoder[curve_key(group.first)].append(group)
        curves = [
            _curve(of_encoder[0].name, sorted(of_encoder, key=lambda g: g.first.fraction))
            for of_encoder in by_encoder.values()
            if len({g.first.fraction for g in of_encoder}) > 1
        ]
        if curves:
            first = members[0].first
            chart = charts.label_curves(curves, first.kind, first.units)
            charts_by_benchmark[benchmark] = data_url(chart)
    return charts_by_benchmark


def _curve(name: str, groups: Sequence[ResultGroup]) -> charts.Curve:
    return charts.Curve(
        name,
        [g.first.fraction for g in groups],
        [g.value for g in groups],
        [min(f.result.interval[0] for f in g.files) for g in groups],
        [max(f.result.interval[1] for f in g.files) for g in groups],
    )


def _benchmarks(groups: Sequence[ResultGroup]) -> list[dict[str, Any]]:
    """Per benchmark: scores per class of the best few, differences, and of every result its confusion, maps and
    origin."""
    sections = []
    for benchmark, members in _by_benchmark(groups).items():
        kind = members[0].first.kind
        differences = difference_rows(members)  # in the order of the command line
        members = sorted(members, key=lambda g: -kind.sign * g.value)
        shown = [g for g in members if g.first.fraction == 1] or members
        best = {f"{g.name} ({g.score_text})": g.first.per_class for g in shown[:_MAX_BARS]}
        absent = sorted({c for g in members for c, v in g.first.per_class.items() if v is None})
        sections.append(
            {
                "name": benchmark,
                "bars": data_url(charts.class_bars(best, kind.of_class)) if any(best.values()) else "",
                "absent": absent,
                "differences": differences,
                "members": [_details(g) for g in members],
            }
        )
    return sections


def _by_benchmark(groups: Sequence[ResultGroup]) -> dict[str, list[ResultGroup]]:
    """{title: results} by benchmark; the title names the target too where a benchmark has results on several."""
    by_key: dict[tuple[str, str, str], list[ResultGroup]] = defaultdict(list)
    for group in groups:
        by_key[benchmark_key(group)].append(group)
    benchmarks = [benchmark for benchmark, _, _ in by_key]
    return {
        benchmark
        if benchmarks.count(benchmark) == 1
        else f"{benchmark}: {target or METRIC_KINDS[metric].title}": members
        for (benchmark, metric, target), members in by_key.items()
    }


def draw_pictures(file: ResultFile) -> dict[str, bytes]:
    """PNGs of one result, by name: ``confusion`` of a segmentation, and ``maps`` where they were stored with it."""
    result = file.result
    drawn: dict[str, bytes] = {}
    classes = list(result.per_class)
    if result.confusion and len(classes) <= charts.MAX_CLASSES:
        drawn["confusion"] = charts.confusion_matrix(
            result.confusion, classes, "pixels" if result.metric == "miou" else "tiles"
        )
    if (path := file.path.parent / MAPS).exists():
        try:
            truth, predicted = untrusted.load_npz(path, ("truth", "answer"))
            _check_maps(truth, predicted, len(classes) if classes else None)
        except (OSError, untrusted.InputError) as error:
            raise EvaluationError(f"{path} cannot be read ({error}); remove it, or evaluate again") from error
        if classes:
            drawn["maps"] = charts.maps(truth, predicted, classes)
        else:
            drawn["maps"] = charts.value_maps(truth, predicted, result.units)
    return drawn


def _check_maps(truth: np.ndarray, predicted: np.ndarray, num_classes: int | None) -> None:
    """InputError unless both are labels (n, H, W) of a few tiles; ``num_classes``: None for numbers."""
    dtype = np.dtype(np.float32 if num_classes is None else np.uint8)
    if truth.dtype != dtype or predicted.dtype != dtype or truth.shape != predicted.shape:
        raise untrusted.InputError(f"truth and answer are not {dtype} of one shape")
    if truth.ndim != 3 or not 0 < len(truth) <= _MAX_MAPS or not truth.size:
        raise untrusted.InputError(
            f"has maps of shape {truth.shape}, expected (n, H, W) of at most {_MAX_MAPS} tiles"
        )
    if num_classes is None:
        return
    if any(label >= num_classes and label != IGNORED for label in np.union1d(truth, predicted)):
        raise untrusted.InputError(f"has labels above the {num_classes} classes of the result")


def _details(group: ResultGroup) -> dict[str, Any]:
    drawn = {name: data_url(png) for name, png in draw_pictures(group.files[0]).items()}
    return {
        "group": group,
        "first": group.first,
        "confusion": drawn.get("confusion"),
        "maps": drawn.get("maps"),
    }


def _relative(path: Path, out: Path) -> str:
    try:
        return str(path.relative_to(out.resolve().parent))
    except ValueError:
        return str(path)
