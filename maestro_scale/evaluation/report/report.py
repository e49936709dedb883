"""Write a report: results next to the published tables, as one self-contained HTML file and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maestro_scale import untrusted
from maestro_scale.escaping import link_target
from maestro_scale.evaluation.probes.dense import IGNORED
from maestro_scale.evaluation.report import charts
from maestro_scale.evaluation.report.groups import ResultFile, ResultGroup, data_key, group_results
from maestro_scale.evaluation.report.pages import data_url, html_templates, markdown_templates
from maestro_scale.evaluation.report.published import (
    COLUMNS,
    CROSS,
    CROSS_REFERENCE,
    IMAGE_REFERENCE,
    INTRA,
    INTRA_REFERENCE,
    PublishedRow,
)
from maestro_scale.evaluation.results import MAPS, EvalResult, EvaluationError
from maestro_scale.training.run_dir import write_atomically

_METRIC = {"wf1": "wF1", "miou": "mIoU"}
CLASS_METRIC = {"wf1": "F1", "miou": "IoU"}  # of one class
_PACKAGE = "maestro_scale.evaluation.report"
_MAX_MAPS = 64
_MAX_BARS = 5  # encoders in a chart of scores per class


@dataclass(frozen=True)
class Cell:
    """A score in a table. ``difference``: to the published reference, percentage points; ``anchor``: id of its section;
    ``oracle``: the oracle's score on the same synthetic tiles. Empty where there is none."""

    text: str
    difference: str = ""
    anchor: str = ""
    oracle: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row of a table, ``ours`` or published."""

    method: str
    cells: tuple[Cell, ...]
    ours: bool


@dataclass(frozen=True)
class Table:
    """A table with the columns of the paper's. ``reference``: what differences are to."""

    title: str
    reference: str
    lines: tuple[TableRow, ...]


def write_report(results: Sequence[ResultFile], out: Path) -> tuple[Path, Path]:
    """Write ``out`` (self-contained HTML) and the tables as ``.md`` next to it; returns both paths. EvaluationError
    where ``out`` is not the name of an HTML file, or the maps of a result cannot be read."""
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise EvaluationError(
            f"--out {out}: name an .html file; its tables are written to .md with the same name"
        )
    groups = group_results(results)
    content: dict[str, Any] = {
        "columns": COLUMNS,
        "tables": _tables(groups),
        "oracle": lambda group: _oracle_score(group, groups),
        "curves": _curves(groups),
        "data": data_key,
        "benchmarks": _benchmarks(groups),
        "metric": _METRIC,
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


def _tables(groups: Sequence[ResultGroup]) -> list[Table]:
    """Results on all labels, by kind of pretraining. An encoder that was not pretrained is compared with those that saw
    the benchmark's data only, as in the paper."""
    full = [g for g in groups if g.first.fraction == 1 and not g.is_oracle]
    known = [g for g in full if any(c.is_of(g.first) for c in COLUMNS)]
    intra = [g for g in known if g.kind in ("intra", "none")]
    cross = [g for g in known if g.kind == "cross"]
    return [
        Table(
            "Pretrained on the benchmark's own data",
            INTRA_REFERENCE.method,
            (*_our_rows(intra, groups), *(_published_row(r) for r in INTRA)),
        ),
        Table(
            "Pretrained elsewhere",
            "MAESTRO from the same data",
            (*_our_rows(cross, groups), *(_published_row(r) for r in CROSS)),
        ),
    ]


def _oracle_score(group: ResultGroup, groups: Sequence[ResultGroup]) -> str:
    """The oracle's score on the benchmark and test split of ``group``; empty if it was not evaluated there."""
    if group.is_oracle:
        return ""
    for other in groups:
        test_splits = {other.first.splits.get("test"), group.first.splits.get("test")} - {None}
        same_data = len({data_key(other.first), data_key(group.first)} - {""}) < 2
        same_tiles = same_data and len(test_splits) < 2
        if other.is_oracle and _benchmark_key(other) == _benchmark_key(group) and same_tiles:
            return f"{100 * other.value:.1f}"
    return ""


def _benchmark_key(group: ResultGroup) -> tuple[str, str, str]:
    return group.first.benchmark, group.first.metric, group.first.target


def _our_rows(groups: Sequence[ResultGroup], all_groups: Sequence[ResultGroup]) -> list[TableRow]:
    """A row per encoder and mode, with a cell per benchmark; more rows where one cell would hold several scores."""
    rows: dict[tuple[object, ...], dict[str, ResultGroup]] = defaultdict(dict)
    for group in groups:
        first = group.first
        key = (first.encoder, first.trained_on, first.mode)
        step, folder = first.checkpoint_step, group.files[0].path.parent
        for candidate in (key, (*key, step), (*key, step, folder)):
            if first.benchmark not in rows[candidate]:
                rows[candidate][first.benchmark] = group
                break
    return [_our_row(key, by_benchmark, all_groups) for key, by_benchmark in rows.items()]


def _our_row(
    key: tuple[object, ...], by_benchmark: Mapping[str, ResultGroup], all_groups: Sequence[ResultGroup]
) -> TableRow:
    group = next(iter(by_benchmark.values()))
    trained_on = group.first.trained_on
    steps = {g.first.checkpoint_step for g in by_benchmark.values() if g.first.checkpoint_step is not None}
    origin = f" from {' + '.join(trained_on)}" if trained_on else " (not pretrained)"
    step = f", step {next(iter(steps))}" if len(steps) == 1 and trained_on else ""
    folder = f", in {group.files[0].path.parent.name}" if len(key) > 4 else ""
    method = f"{group.encoder}{'' if group.is_image else origin}{step}, {group.first.mode}{folder}"
    cells = tuple(_cell(by_benchmark.get(c.benchmark), i, all_groups) for i, c in enumerate(COLUMNS))
    return TableRow(method, cells, True)


def _cell(group: ResultGroup | None, column: int, all_groups: Sequence[ResultGroup]) -> Cell:
    if group is None:
        return Cell("–")
    reference = _reference(group)
    published = reference.scores[column] if reference else None
    difference = "" if published is None else f"{100 * group.value - published:+.1f}"
    return Cell(group.score_text, difference, group.anchor, _oracle_score(group, all_groups))


def _reference(group: ResultGroup) -> PublishedRow | None:
    """The published row that a result is compared with; None where no method had the same pretraining."""
    if group.is_image:
        return next(
            (row for name, row in IMAGE_REFERENCE.items() if name in group.first.encoder.lower()), None
        )
    if group.kind == "cross":
        return CROSS_REFERENCE.get(group.first.trained_on[0]) if len(group.first.trained_on) == 1 else None
    return INTRA_REFERENCE


def _published_row(row: PublishedRow) -> TableRow:
    return TableRow(row.method, tuple(Cell("–" if s is None else f"{s:.1f}") for s in row.scores), False)


def _curves(groups: Sequence[ResultGroup]) -> dict[str, str]:
    """{benchmark: chart as a data URL} where an encoder was scored on more than one fraction of the labels."""
    charts_by_benchmark = {}
    for benchmark, members in _by_benchmark(groups).items():
        by_encoder: dict[tuple[object, ...], list[ResultGroup]] = defaultdict(list)
        for group in members:
            by_encoder[_curve_key(group.first)].append(group)
        curves = [
            _curve(of_encoder[0].name, sorted(of_encoder, key=lambda g: g.first.fraction))
            for of_encoder in by_encoder.values()
            if len({g.first.fraction for g in of_encoder}) > 1
        ]
        if curves:
            chart = charts.label_curves(curves, _METRIC[members[0].first.metric])
            charts_by_benchmark[benchmark] = data_url(chart)
    return charts_by_benchmark


def _curve_key(first: EvalResult) -> tuple[object, ...]:
    """What results on several fractions of the labels have in common."""
    weights = (first.encoder, first.weights, first.trained_on, first.checkpoint_step)
    return (*weights, first.mode, data_key(first), first.splits.get("test"))


def _curve(name: str, groups: Sequence[ResultGroup]) -> charts.Curve:
    return charts.Curve(
        name,
        [g.first.fraction for g in groups],
        [g.value for g in groups],
        [min(f.result.interval[0] for f in g.files) for g in groups],
        [max(f.result.interval[1] for f in g.files) for g in groups],
    )


def _benchmarks(groups: Sequence[ResultGroup]) -> list[dict[str, Any]]:
    """Per benchmark: scores per class of the best few, and of every result its confusion, maps and origin."""
    sections = []
    for benchmark, members in _by_benchmark(groups).items():
        members = sorted(members, key=lambda g: -g.value)
        shown = [g for g in members if g.first.fraction == 1] or members
        best = {f"{g.name} ({g.score_text})": g.first.per_class for g in shown[:_MAX_BARS]}
        metric = CLASS_METRIC[members[0].first.metric]
        absent = sorted({c for g in members for c, v in g.first.per_class.items() if v is None})
        sections.append(
            {
                "name": benchmark,
                "bars": data_url(charts.class_bars(best, metric)),
                "absent": absent,
                "members": [_details(g) for g in members],
            }
        )
    return sections


def _by_benchmark(groups: Sequence[ResultGroup]) -> dict[str, list[ResultGroup]]:
    """{title: results} by benchmark; the title names the target too where a benchmark has results on several."""
    by_key: dict[tuple[str, str, str], list[ResultGroup]] = defaultdict(list)
    for group in groups:
        by_key[_benchmark_key(group)].append(group)
    benchmarks = [benchmark for benchmark, _, _ in by_key]
    return {
        benchmark
        if benchmarks.count(benchmark) == 1
        else f"{benchmark}: {target or _METRIC[metric]}": members
        for (benchmark, metric, target), members in by_key.items()
    }


def draw_pictures(file: ResultFile) -> dict[str, bytes]:
    """PNGs of one result, by name: ``confusion`` of a segmentation, and ``maps`` where they were stored with it."""
    result = file.result
    drawn: dict[str, bytes] = {}
    classes = list(result.per_class)
    if result.confusion and len(classes) <= charts.MAX_CLASSES:
        drawn["confusion"] = charts.confusion_matrix(result.confusion, classes)
    if (path := file.path.parent / MAPS).exists():
        try:
            truth, predicted = untrusted.load_npz(path, ("truth", "answer"))
            _check_maps(truth, predicted, len(classes))
        except (OSError, untrusted.InputError) as error:
            raise EvaluationError(f"{path} cannot be read ({error}); remove it, or evaluate again") from error
        drawn["maps"] = charts.maps(truth, predicted, classes)
    return drawn


def _check_maps(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> None:
    """InputError unless both are labels (n, H, W) of a few tiles."""
    if truth.dtype != np.uint8 or predicted.dtype != np.uint8 or truth.shape != predicted.shape:
        raise untrusted.InputError("truth and answer are not uint8 of one shape")
    if truth.ndim != 3 or not 0 < len(truth) <= _MAX_MAPS or not truth.size:
        raise untrusted.InputError(
            f"has maps of shape {truth.shape}, expected (n, H, W) of at most {_MAX_MAPS} tiles"
        )
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
