"""Any number of results beside the published tables, as one self-contained HTML file and as Markdown."""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from maestro_scale.evaluation import charts
from maestro_scale.evaluation.published import (
    COLUMNS,
    CROSS,
    CROSS_REFERENCE,
    INTRA,
    INTRA_REFERENCE,
    Row,
)
from maestro_scale.evaluation.results import MAPS, EvalResult, ResultsError
from maestro_scale.training.run_dir import write_atomically

RESULTS = "results.json"
ORACLE = "oracle"

_METRIC = {"wf1": "wF1", "miou": "mIoU"}
CLASS_METRIC = {"wf1": "F1", "miou": "IoU"}  # of one class
_MOST_BARS = 5


@dataclass(frozen=True)
class Found:
    """A result and where it lies."""

    path: Path
    result: EvalResult


@dataclass(frozen=True)
class Series:
    """Results that differ in nothing but the seed (or the fold): one number."""

    found: tuple[Found, ...]

    @property
    def first(self) -> EvalResult:
        """A representative."""
        return self.found[0].result

    @property
    def name(self) -> str:
        """Encoder and mode, for legends."""
        if self.is_oracle:
            return "oracle"
        return f"{Path(self.first.encoder).name or 'encoder'}, {self.first.mode}"

    @property
    def is_oracle(self) -> bool:
        """Not an encoder's score, but what can be reached."""
        return self.first.mode == ORACLE

    @property
    def value(self) -> float:
        """Mean over seeds and folds."""
        return fmean(self._values)

    @property
    def _values(self) -> list[float]:
        """A score per run."""
        runs = [[r.value for r in f.result.runs] or [f.result.value] for f in self.found]
        return [value for values in runs for value in values]

    @property
    def num_tiles(self) -> int:
        """Tiles that were scored: those of another fold, or another split, are others."""
        return sum(
            {(f.result.folds, f.result.splits.get("test")): f.result.num_tiles for f in self.found}.values()
        )

    @property
    def over(self) -> str:
        """``3 seeds, 5 folds``; empty for a single run."""
        if len(self._values) == 1:
            return ""
        results = [f.result for f in self.found]
        counts = {
            "seeds": {s for r in results for s in r.seeds},
            "folds": {f for r in results for f in r.folds},
        }
        return ", ".join(f"{len(c)} {what}" for what, c in counts.items() if len(c) > 1) or "runs"

    @property
    def lines(self) -> list[tuple[str, str, Path]]:
        """(which run, its score, its results file) of every run."""
        lines = []
        for f in self.found:
            r = f.result
            runs = [(run.fold, run.seed, run.value, f.path.parent / run.path) for run in r.runs]
            for number, seed, value, path in runs or [
                (r.folds[0] if r.folds else None, r.seeds[0], r.value, f.path)
            ]:
                which = f"seed {seed}" if number is None else f"fold {number}, seed {seed}"
                lines.append((which, f"{100 * value:.1f}", path))
        return lines

    @property
    def text(self) -> str:
        """``78.8 ± 0.2`` over seeds and folds, or ``78.8 (77.9-79.6)`` with the bootstrap interval of the only run."""
        values = [100 * value for value in self._values]
        if len(values) > 1:
            return f"{fmean(values):.1f} ± {stdev(values):.1f}"
        low, high = self.first.interval
        return f"{values[0]:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    @property
    def kind(self) -> str:
        """``intra``: pretrained on the benchmark's own data; ``cross``: on other data; ``none``: not at all."""
        if not self.first.trained_on:
            return "none"
        return "intra" if self.first.trained_on == (self.first.benchmark,) else "cross"

    @property
    def anchor(self) -> str:
        """Where the report tells more of it."""
        return "r" + hashlib.sha256(str(self.found[0].path).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Cell:
    """A number of a table. ``difference``: to the published reference, percent points; ``anchor``: its section;
    ``oracle``: what can be reached on the same, synthetic, tiles."""

    text: str
    difference: str = ""
    anchor: str = ""
    oracle: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table; ``ours`` or published."""

    method: str
    cells: tuple[Cell, ...]
    ours: bool


@dataclass(frozen=True)
class Table:
    """A table laid out as the paper's."""

    title: str
    reference: str
    lines: tuple[Line, ...]


def find_results(paths: Iterable[Path]) -> list[Found]:
    """Every ``results.json`` among the files and under the folders. ResultsError if a path has none, or one is bad."""
    found: list[Path] = []
    for path in paths:
        here = sorted(path.rglob(RESULTS)) if path.is_dir() else [path]
        if not here:
            raise ResultsError(f"{path}: no {RESULTS} in there; make one with evaluate.py --out {path}")
        found += here
    unique = dict.fromkeys(p.resolve() for p in found)
    loaded = [Found(p, EvalResult.load(p)) for p in unique]
    # What lies in the folder of a mean is, or was, one of its runs.
    means = {f.path.parent for f in loaded if f.result.runs}
    return [f for f in loaded if not means & set(f.path.parent.parents)]


def write_report(found: Sequence[Found], out: Path) -> tuple[Path, Path]:
    """Write ``out`` (HTML, everything inside) and the tables as ``.md`` beside it; returns both."""
    series = _series(found)
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
        loader=PackageLoader("maestro_scale.evaluation", "templates"),
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


def _series(found: Sequence[Found]) -> list[Series]:
    groups: dict[tuple, list[Found]] = defaultdict(list)
    for f in found:
        r = f.result
        key = (r.benchmark, r.encoder, r.trained_on, r.checkpoint_step, r.mode, r.fraction, bool(r.folds))
        groups[key].append(f)
    return [Series(tuple(g)) for g in groups.values()]


def _tables(series: Sequence[Series]) -> list[Table]:
    full = [s for s in series if s.first.fraction == 1 and not s.is_oracle]
    known = [s for s in full if s.first.benchmark in {c.benchmark for c in COLUMNS}]
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


def _oracle(series: Series, among: Sequence[Series]) -> str:
    """What the oracle reaches where ``series`` was scored; empty where it was not asked."""
    first = series.first
    for s in among:
        tested = {s.first.splits.get("test"), first.splits.get("test")} - {None}
        if s.is_oracle and not series.is_oracle and s.first.benchmark == first.benchmark and len(tested) < 2:
            return f"{100 * s.value:.1f}"
    return ""


def _ours(series: Sequence[Series], every: Sequence[Series]) -> list[Line]:
    rows: dict[tuple, dict[str, Series]] = defaultdict(dict)
    for s in series:
        if s.first.benchmark in rows[key := (s.first.encoder, s.first.trained_on, s.first.mode)]:
            key = (*key, s.first.checkpoint_step)
        rows[key][s.first.benchmark] = s
    lines = []
    for key, by_benchmark in rows.items():
        encoder, trained_on, mode = key[:3]
        steps = sorted({s.first.checkpoint_step for s in by_benchmark.values()} - {None})
        origin = f" from {' + '.join(trained_on)}" if trained_on else " (not pretrained)"
        at = f", step {steps[0]}" if len(steps) == 1 and trained_on else ""
        cells = tuple(_cell(by_benchmark.get(c.benchmark), i, every) for i, c in enumerate(COLUMNS))
        lines.append(Line(f"{Path(encoder).name or 'encoder'}{origin}{at}, {mode}", cells, True))
    return lines


def _cell(series: Series | None, column: int, every: Sequence[Series]) -> Cell:
    if series is None:
        return Cell("–")
    reference = _reference(series)
    published = reference.scores[column] if reference else None
    difference = "" if published is None else f"{100 * series.value - published:+.1f}"
    return Cell(series.text, difference, series.anchor, _oracle(series, every))


def _reference(series: Series) -> Row | None:
    if series.kind == "cross":
        return CROSS_REFERENCE.get(series.first.trained_on[0]) if len(series.first.trained_on) == 1 else None
    return INTRA_REFERENCE


def _published(row: Row) -> Line:
    return Line(row.method, tuple(Cell("–" if s is None else f"{s:.1f}") for s in row.scores), False)


def _curves(series: Sequence[Series]) -> dict[str, str]:
    """{benchmark: picture} where an encoder was scored on more than one share of the labels."""
    groups: dict[str, dict[str, list[Series]]] = defaultdict(lambda: defaultdict(list))
    for s in series:
        groups[s.first.benchmark][s.name].append(s)
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
                        [min(f.result.interval[0] for f in m.found) for m in members],
                        [max(f.result.interval[1] for f in m.found) for m in members],
                    )
                )
        if curves:
            pictures[benchmark] = _data(charts.label_curves(curves, _metric(by_name)))
    return pictures


def _metric(by_name: Mapping[str, list[Series]]) -> str:
    return _METRIC[next(iter(by_name.values()))[0].first.metric]


def _benchmarks(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Per benchmark: bars of the best few, and of every series its confusion, maps and origin."""
    groups: dict[str, list[Series]] = defaultdict(list)
    for s in series:
        groups[s.first.benchmark].append(s)
    sections = []
    for benchmark, members in groups.items():
        members = sorted(members, key=lambda s: -s.value)
        shown = [s for s in members if s.first.fraction == 1] or members
        best = {f"{s.name} ({s.text})": s.first.per_class for s in shown[:_MOST_BARS]}
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


def pictures(found: Found) -> dict[str, bytes]:
    """PNGs of one result, by name: ``confusion`` of a segmentation, and ``maps`` where it kept some."""
    result, drawn = found.result, {}
    classes = list(result.per_class)
    if result.confusion:
        drawn["confusion"] = charts.confusion_matrix(result.confusion, classes)
    if (path := found.path.parent / MAPS).exists():
        with np.load(path) as stored:
            drawn["maps"] = charts.maps(stored["truth"], stored["answer"], classes)
    return drawn


def _details(series: Series) -> dict[str, Any]:
    drawn = {name: _data(png) for name, png in pictures(series.found[0]).items()}
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
