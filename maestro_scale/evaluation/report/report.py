"""Any number of results beside the published tables, as one self-contained HTML file and as Markdown."""

from __future__ import annotations

import base64
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from maestro_scale.evaluation.report import charts
from maestro_scale.evaluation.report.groups import ResultFile, ResultGroup, group_results
from maestro_scale.evaluation.report.published import (
    COLUMNS,
    CROSS,
    CROSS_REFERENCE,
    IMAGE_REFERENCE,
    INTRA,
    INTRA_REFERENCE,
    PublishedRow,
)
from maestro_scale.evaluation.results import MAPS, ResultsError
from maestro_scale.training.run_dir import write_atomically

_METRIC = {"wf1": "wF1", "miou": "mIoU"}
CLASS_METRIC = {"wf1": "F1", "miou": "IoU"}  # of one class
_MOST_BARS = 5


@dataclass(frozen=True)
class Cell:
    """A number of a table. ``difference``: to the published reference, percent points; ``anchor``: its section;
    ``oracle``: what can be reached on the same, synthetic, tiles."""

    text: str
    difference: str = ""
    anchor: str = ""
    oracle: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row of a table; ``ours`` or published."""

    method: str
    cells: tuple[Cell, ...]
    ours: bool


@dataclass(frozen=True)
class Table:
    """A table laid out as the paper's."""

    title: str
    reference: str
    lines: tuple[TableRow, ...]


def write_report(found: Sequence[ResultFile], out: Path) -> tuple[Path, Path]:
    """Write ``out`` (HTML, everything inside) and the tables as ``.md`` beside it; returns both. ResultsError where
    ``out`` is no name of an HTML file, or pictures beside a result cannot be read."""
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise ResultsError(f"--out {out}: name an .html file; its tables go to .md beside it")
    series = group_results(found)
    content: dict[str, Any] = {
        "columns": COLUMNS,
        "tables": _tables(series),
        "oracle": lambda s: _oracle(s, series),
        "curves": _curves(series),
        "benchmarks": _benchmarks(series),
        "metric": _METRIC,
        "where": lambda path: _relative(path, out),
        "recipe": lambda r: yaml.safe_dump(r, sort_keys=False, width=110),
    }
    env = Environment(
        loader=PackageLoader("maestro_scale.evaluation.report", "templates"),
        autoescape=lambda name: bool(name) and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = env.get_template("report.html").render(content)
    text = env.get_template("report.md").render(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    write_atomically(out.with_suffix(".md"), text)
    return out, out.with_suffix(".md")


def _tables(series: Sequence[ResultGroup]) -> list[Table]:
    full = [s for s in series if s.first.fraction == 1 and not s.is_oracle]
    known = [s for s in full if any(c.is_of(s.first) for c in COLUMNS)]
    intra = [s for s in known if s.kind in ("intra", "none")]
    cross = [s for s in known if s.kind == "cross"]
    return [
        Table(
            "Pretrained on the benchmark's own data",
            INTRA_REFERENCE.method,
            (*_ours(intra, series), *(_published(r) for r in INTRA)),
        ),
        Table(
            "Pretrained elsewhere",
            "MAESTRO from the same data",
            (*_ours(cross, series), *(_published(r) for r in CROSS)),
        ),
    ]


def _oracle(series: ResultGroup, among: Sequence[ResultGroup]) -> str:
    """What the oracle reaches where ``series`` was scored; empty where it was not asked."""
    first = series.first
    for s in among:
        tested = {s.first.splits.get("test"), first.splits.get("test")} - {None}
        if (
            s.is_oracle
            and not series.is_oracle
            and _benchmark_key(s) == _benchmark_key(series)
            and len(tested) < 2
        ):
            return f"{100 * s.value:.1f}"
    return ""


def _benchmark_key(series: ResultGroup) -> tuple[str, str, str]:
    return series.first.benchmark, series.first.metric, series.first.target


def _ours(series: Sequence[ResultGroup], every: Sequence[ResultGroup]) -> list[TableRow]:
    """A row per encoder and mode; several where it was scored in more than one way."""
    rows: dict[tuple, dict[str, ResultGroup]] = defaultdict(dict)
    for s in series:
        key = (s.first.encoder, s.first.trained_on, s.first.mode)
        for more in ((), (s.first.checkpoint_step,), (s.first.checkpoint_step, s.files[0].path.parent)):
            if s.first.benchmark not in rows[(*key, *more)]:
                rows[(*key, *more)][s.first.benchmark] = s
                break
    lines = []
    for key, by_benchmark in rows.items():
        (_, trained_on, mode), first = key[:3], next(iter(by_benchmark.values()))
        steps = sorted({s.first.checkpoint_step for s in by_benchmark.values()} - {None})
        origin = f" from {' + '.join(trained_on)}" if trained_on else " (not pretrained)"
        at = f", step {steps[0]}" if len(steps) == 1 and trained_on else ""
        where = f", in {key[4].name}" if len(key) > 4 else ""
        cells = tuple(_cell(by_benchmark.get(c.benchmark), i, every) for i, c in enumerate(COLUMNS))
        method = f"{first.encoder}{'' if first.is_image else origin}{at}, {mode}{where}"
        lines.append(TableRow(method, cells, True))
    return lines


def _cell(series: ResultGroup | None, column: int, every: Sequence[ResultGroup]) -> Cell:
    if series is None:
        return Cell("–")
    reference = _reference(series)
    published = reference.scores[column] if reference else None
    difference = "" if published is None else f"{100 * series.value - published:+.1f}"
    return Cell(series.score_text, difference, series.anchor, _oracle(series, every))


def _reference(series: ResultGroup) -> PublishedRow | None:
    if series.is_image:
        return next(
            (row for name, row in IMAGE_REFERENCE.items() if name in series.first.encoder.lower()), None
        )
    if series.kind == "cross":
        return CROSS_REFERENCE.get(series.first.trained_on[0]) if len(series.first.trained_on) == 1 else None
    return INTRA_REFERENCE


def _published(row: PublishedRow) -> TableRow:
    return TableRow(row.method, tuple(Cell("–" if s is None else f"{s:.1f}") for s in row.scores), False)


def _curves(series: Sequence[ResultGroup]) -> dict[str, str]:
    """{benchmark: picture} where an encoder was scored on more than one share of the labels."""
    groups: dict[str, dict[str, list[ResultGroup]]] = defaultdict(lambda: defaultdict(list))
    for title, members in _by_benchmark(series).items():
        for s in members:
            groups[title][s.name].append(s)
    pictures = {}
    for benchmark, by_name in groups.items():
        curves = []
        for name, members in by_name.items():
            members = sorted(members, key=lambda s: s.first.fraction)
            if len({m.first.fraction for m in members}) > 1:
                curves.append(
                    charts.Curve(
                        name,
                        [m.first.fraction for m in members],
                        [m.value for m in members],
                        [min(f.result.interval[0] for f in m.files) for m in members],
                        [max(f.result.interval[1] for f in m.files) for m in members],
                    )
                )
        if curves:
            pictures[benchmark] = _data(charts.label_curves(curves, _metric(by_name)))
    return pictures


def _metric(by_name: Mapping[str, list[ResultGroup]]) -> str:
    return _METRIC[next(iter(by_name.values()))[0].first.metric]


def _benchmarks(series: Sequence[ResultGroup]) -> list[dict[str, Any]]:
    """Per benchmark: bars of the best few, and of every series its confusion, maps and origin."""
    sections = []
    for benchmark, members in _by_benchmark(series).items():
        members = sorted(members, key=lambda s: -s.value)
        shown = [s for s in members if s.first.fraction == 1] or members
        best = {f"{s.name} ({s.score_text})": s.first.per_class for s in shown[:_MOST_BARS]}
        metric = CLASS_METRIC[members[0].first.metric]
        absent = sorted({c for s in members for c, v in s.first.per_class.items() if v is None})
        sections.append(
            {
                "name": benchmark,
                "bars": _data(charts.class_bars(best, metric)),
                "absent": absent,
                "members": [_details(s) for s in members],
            }
        )
    return sections


def _by_benchmark(series: Sequence[ResultGroup]) -> dict[str, list[ResultGroup]]:
    """By benchmark; where it was asked more than one thing, by what was asked."""
    groups: dict[tuple[str, str, str], list[ResultGroup]] = defaultdict(list)
    for s in series:
        groups[_benchmark_key(s)].append(s)
    benchmarks = [benchmark for benchmark, _, _ in groups]
    return {
        benchmark
        if benchmarks.count(benchmark) == 1
        else f"{benchmark}: {target or _METRIC[metric]}": members
        for (benchmark, metric, target), members in groups.items()
    }


def draw_pictures(found: ResultFile) -> dict[str, bytes]:
    """PNGs of one result, by name: ``confusion`` of a segmentation, and ``maps`` where it kept some."""
    result, drawn = found.result, {}
    classes = list(result.per_class)
    if result.confusion:
        drawn["confusion"] = charts.confusion_matrix(result.confusion, classes)
    if (path := found.path.parent / MAPS).exists():
        try:
            with np.load(path) as stored:
                truth, answer = stored["truth"], stored["answer"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ResultsError(f"{path} cannot be read ({error}); remove it, or evaluate again") from error
        drawn["maps"] = charts.maps(truth, answer, classes)
    return drawn


def _details(series: ResultGroup) -> dict[str, Any]:
    drawn = {name: _data(png) for name, png in draw_pictures(series.files[0]).items()}
    return {
        "series": series,
        "first": series.first,
        "confusion": drawn.get("confusion"),
        "maps": drawn.get("maps"),
    }


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _relative(path: Path, out: Path) -> str:
    try:
        return str(path.relative_to(out.resolve().parent))
    except ValueError:
        return str(path)
