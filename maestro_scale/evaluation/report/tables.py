"""The tables of a report: like is compared with like.

Real and synthetic data, frozen and finetuned encoders have tables of their own. A difference from a published number is
given only for the same data, test split, mode, metric and architecture. Cells of a benchmark that was not run are
empty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maestro_scale.evaluation.metric_kinds import METRIC_KINDS, UNBOUNDED_SCORES, significant
from maestro_scale.evaluation.report.groups import FROZEN_MODES, ResultGroup, data_key
from maestro_scale.evaluation.report.published import (
    COLUMNS,
    CROSS,
    CROSS_REFERENCE,
    IMAGE_REFERENCE,
    INTRA,
    INTRA_REFERENCE,
    PRETRAINING_DATA,
    SCRATCH_REFERENCE,
    TEMPLATE_FRACTIONS,
    BenchmarkColumn,
    PublishedRow,
)
from maestro_scale.evaluation.results import EvalResult

EMPTY = "–"
_TITLES = {"r2": "R²", "mae": "MAE", "macro_f1": "macro F1"}


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
    """A row of a table. ``ours``: evaluated here, to be highlighted."""

    method: str
    cells: tuple[Cell, ...]
    ours: bool


@dataclass(frozen=True)
class Table:
    """``columns``: (title, metric and unit). ``note``: what the cells mean."""

    title: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[TableRow, ...]
    note: str


def build_tables(groups: Sequence[ResultGroup]) -> list[Table]:
    """All tables of these results; those that the paper fills are there without a result too."""
    shown = [g for g in groups if not g.is_oracle]
    tables: list[Table] = []
    for synthetic in (False, True):
        for frozen in (False, True):
            of_kind = [
                g
                for g in shown
                if g.first.fraction == 1
                and is_synthetic(g, groups) == synthetic
                and (g.first.mode in FROZEN_MODES) == frozen
            ]
            tables += _score_tables(of_kind, groups, synthetic, frozen)
    for synthetic in (False, True):
        of_data = [g for g in shown if is_synthetic(g, groups) == synthetic]
        tables += _fraction_tables(of_data, synthetic)
    return tables + [_sensor_table(g) for g in groups if g.first.by_sensors]


def _sensor_table(group: ResultGroup) -> Table:
    """What the oracle's score is with some kinds of sensors alone: a row per class, a column per set."""
    result = group.first
    sets = result.by_sensors
    overall = [
        f"{result.kind.number(s.value)} ({result.kind.number(s.interval[0])}-{result.kind.number(s.interval[1])})"
        for s in sets.values()
    ]
    lines = [TableRow("all classes", tuple(map(Cell, overall)), True)]
    for name in result.per_class:
        scores = [s.per_class.get(name) for s in sets.values()]
        cells = tuple(Cell(EMPTY if s is None else f"{100 * s:.1f}") for s in scores)
        lines.append(TableRow(name, cells, False))
    return Table(
        f"{result.benchmark}: score of the oracle by kinds of sensors",
        tuple((name, f"{result.kind.title}, %") for name in sets),
        tuple(lines),
        "A class that two kinds together separate is low in the column of either, and high in that of both. "
        f"In the rows of classes: {result.kind.of_class}.",
    )


def is_synthetic(group: ResultGroup, groups: Sequence[ResultGroup]) -> bool:
    """Whether its tiles are synthetic: it says so, or the oracle, which accepts no other, was evaluated on them.
    A result that does not say (written by an earlier revision) counts as real."""
    if any(f.result.synthetic for f in group.files):
        return True
    return any(
        other.is_oracle and data_key(other.first) and data_key(other.first) == data_key(group.first)
        for other in groups
    )


def oracle_score(group: ResultGroup, groups: Sequence[ResultGroup]) -> str:
    """The oracle's score on the benchmark and test split of ``group``; empty if it was not evaluated there."""
    if group.is_oracle:
        return ""
    for other in groups:
        test_splits = {other.first.splits.get("test"), group.first.splits.get("test")} - {None}
        same_data = len({data_key(other.first), data_key(group.first)} - {""}) < 2
        same_tiles = same_data and len(test_splits) < 2
        if other.is_oracle and benchmark_key(other) == benchmark_key(group) and same_tiles:
            return group.first.kind.number(other.value)
    return ""


def benchmark_key(group: ResultGroup) -> tuple[str, str, str]:
    """(benchmark, metric, target)."""
    return group.first.benchmark, group.first.metric, group.first.target


def _score_tables(
    groups: Sequence[ResultGroup], every: Sequence[ResultGroup], synthetic: bool, frozen: bool
) -> list[Table]:
    """Tables of one kind of data and of modes; those of finetuned encoders on real data have the published rows."""
    title = f"{'Synthetic' if synthetic else 'Real'} data, {'frozen encoder' if frozen else 'finetuned'}"
    known = [g for g in groups if any(c.is_of(g.first) for c in COLUMNS)]
    tables = []
    if not synthetic and not frozen:
        intra = [g for g in known if g.kind in ("intra", "none")]
        cross = [g for g in known if g.kind == "cross"]
        tables += [
            _paper_table(f"{title}: pretrained on the benchmark's own data", intra, every, INTRA),
            _paper_table(f"{title}: pretrained elsewhere", cross, every, CROSS),
        ]
    elif known:
        tables.append(_paper_table(title, known, every, ()))
    if (not synthetic and not frozen) or any(g.kind == "cross" for g in known):
        tables.append(_transfer_table(f"{title}: by pretraining data", known))
    others = [g for g in groups if g not in known]
    by_key: dict[tuple[str, str, str], list[ResultGroup]] = defaultdict(list)
    for group in others:
        by_key[benchmark_key(group)].append(group)
    return [*tables, *(_other_table(title, key, members) for key, members in by_key.items())]


def _paper_table(
    title: str, groups: Sequence[ResultGroup], every: Sequence[ResultGroup], published: Sequence[PublishedRow]
) -> Table:
    """Columns of the paper; rows of ours, then the published ones."""
    note = (
        "Evaluated here: with a 95 % bootstrap interval over tiles, or mean ± deviation over seeds and folds."
    )
    if published:
        note = (
            "Highlighted: evaluated here, with a 95 % bootstrap interval over tiles, or mean ± deviation over seeds "
            "and folds, and the difference to the published row of the same pretraining, architecture and mode, if "
            "the test split is the official one. The others are the published numbers of arXiv 2508.10894, on the "
            "real test sets."
        )
    unknown = sum(g.first.synthetic is None for g in groups)
    if published and unknown:
        note += (
            f" Results that do not record whether their data is synthetic, of earlier revisions: {unknown}."
        )
    lines = (*_our_rows(groups, every), *(_published_row(r) for r in published))
    return Table(title, tuple((c.title, f"{c.metric}, %") for c in COLUMNS), lines, note)


def _our_rows(groups: Sequence[ResultGroup], every: Sequence[ResultGroup]) -> list[TableRow]:
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
    return [_our_row(key, by_benchmark, every) for key, by_benchmark in rows.items() if by_benchmark]


def _our_row(
    key: tuple[object, ...], by_benchmark: Mapping[str, ResultGroup], every: Sequence[ResultGroup]
) -> TableRow:
    group = next(iter(by_benchmark.values()))
    steps = {g.first.checkpoint_step for g in by_benchmark.values() if g.first.checkpoint_step is not None}
    step = f", step {next(iter(steps))}" if len(steps) == 1 and group.first.trained_on else ""
    folder = f", in {group.files[0].path.parent.name}" if len(key) > 4 else ""
    method = f"{_origin(group)}{step}, {group.first.mode}{folder}"
    cells = tuple(_cell(by_benchmark.get(c.benchmark), c, i, every) for i, c in enumerate(COLUMNS))
    return TableRow(method, cells, True)


def _origin(group: ResultGroup) -> str:
    """Name of the encoder, and what it was pretrained on."""
    if group.is_published:
        return group.encoder
    trained_on = group.first.trained_on
    return group.encoder + (f" from {' + '.join(trained_on)}" if trained_on else " (not pretrained)")


def _cell(
    group: ResultGroup | None, column: BenchmarkColumn, number: int, every: Sequence[ResultGroup]
) -> Cell:
    if group is None:
        return Cell(EMPTY)
    reference = _reference(group, column, every)
    published = reference.scores[number] if reference else None
    difference = "" if published is None else f"{100 * group.value - published:+.1f}"
    return Cell(group.score_text, difference, group.anchor, oracle_score(group, every))


def _reference(
    group: ResultGroup, column: BenchmarkColumn, every: Sequence[ResultGroup]
) -> PublishedRow | None:
    """The published row that a result is compared with; None where none is of the same data, split, mode, metric,
    pretraining and architecture. Files of earlier revisions do not say which MAESTRO was evaluated: None."""
    first, architecture = group.first, group.first.architecture
    official = column.is_official(f.result for f in group.files)
    if is_synthetic(group, every) or not official or first.fraction != 1 or not column.is_of(first):
        return None
    if group.is_published:
        head, _, weights = first.encoder.partition(":")
        name = weights.rstrip("/").rpartition("/")[2]
        return IMAGE_REFERENCE.get(name) if (head, first.mode) == ("image", "finetune") else None
    if architecture is None or first.mode not in ("finetune", "scratch"):
        return None
    if first.mode == "scratch":
        return SCRATCH_REFERENCE.get(architecture)
    if group.kind == "intra":
        return INTRA_REFERENCE.get(architecture)
    return CROSS_REFERENCE.get((first.trained_on[0], architecture)) if len(first.trained_on) == 1 else None


def _published_row(row: PublishedRow) -> TableRow:
    return TableRow(row.method, tuple(Cell(EMPTY if s is None else f"{s:.1f}") for s in row.scores), False)


def _transfer_table(title: str, groups: Sequence[ResultGroup]) -> Table:
    """The cross-dataset template: rows are what MAESTRO was pretrained on, columns are benchmarks; of several results
    the one with most steps."""
    found: dict[tuple[str, str], list[ResultGroup]] = defaultdict(list)
    for group in groups:
        if not group.is_published and group.first.trained_on:
            own = group.kind == "intra"
            source = "the benchmark's own data" if own else " + ".join(group.first.trained_on)
            found[f"{source}, {group.first.mode}", group.first.benchmark].append(group)
    names = list(dict.fromkeys(name for name, _ in found))
    for source in PRETRAINING_DATA:  # rows of the paper that were not run
        if not any(name.startswith(f"{source}, ") for name in names):
            names.append(source)

    def best(name: str, benchmark: str) -> Cell:
        candidates = found.get((name, benchmark))
        if not candidates:
            return Cell(EMPTY)
        group = max(candidates, key=lambda g: g.first.checkpoint_step or 0)
        return Cell(group.score_text, anchor=group.anchor)

    lines = tuple(
        TableRow(name, tuple(best(name, column.benchmark) for column in COLUMNS), False) for name in names
    )
    columns = tuple((c.title, f"{c.metric}, %") for c in COLUMNS)
    return Table(
        title,
        columns,
        lines,
        "Rows: the data of the pretraining. Of several results the longest pretraining.",
    )


def _other_table(title: str, key: tuple[str, str, str], groups: Sequence[ResultGroup]) -> Table:
    """A benchmark without published numbers: a row per result, a column per score."""
    benchmark, metric, target = key
    kind, units = METRIC_KINDS[metric], groups[0].first.units
    names = list(dict.fromkeys(name for g in groups for name in g.first.scores))
    ordered = sorted(groups, key=lambda g: -kind.sign * g.value)
    lines = []
    for group in ordered:
        scores = [_score_text(name, group.first.scores.get(name)) for name in names]
        cells = (Cell(group.score_text, anchor=group.anchor), *map(Cell, scores))
        step = f", step {group.first.checkpoint_step}" if group.first.trained_on else ""
        lines.append(TableRow(f"{_origin(group)}{step}, {group.first.mode}", cells, False))
    columns = [(kind.title, kind.unit(units))]
    columns += [(_TITLES.get(name, name.replace("_", " ")), _score_unit(name, units)) for name in names]
    name = f"{benchmark}: {target}" if target else benchmark
    note = "Evaluated here: with a 95 % bootstrap interval over tiles, or mean ± deviation over seeds and folds. "
    note += f"{kind.title}: {'higher' if kind.higher_is_better else 'lower'} is better."
    return Table(f"{name} ({title[0].lower()}{title[1:]})", tuple(columns), tuple(lines), note)


def score_text(name: str, value: float) -> str:
    """One of the other scores of a result, without its unit."""
    return significant(value) if name in UNBOUNDED_SCORES else f"{100 * value:.1f}"


def _score_text(name: str, value: float | None) -> str:
    return EMPTY if value is None else score_text(name, value)


def _score_unit(name: str, units: str) -> str:
    if name not in UNBOUNDED_SCORES:
        return "%"
    return "" if name == "r2" else units


def _fraction_tables(groups: Sequence[ResultGroup], synthetic: bool) -> list[Table]:
    """Scores by share of the training labels, a table per benchmark; the paper's template where nothing was run."""
    by_key: dict[tuple[str, str, str], list[ResultGroup]] = defaultdict(list)
    for group in groups:
        by_key[benchmark_key(group)].append(group)
    few = {key: m for key, m in by_key.items() if any(g.first.fraction < 1 for g in m)}
    data = "Synthetic" if synthetic else "Real"
    tables = []
    for (benchmark, metric, target), members in few.items():
        kind, units = METRIC_KINDS[metric], members[0].first.units
        name = f"{benchmark}: {target}" if target else benchmark
        heading = f"{kind.title}, {kind.unit(units)}".rstrip(", ")
        tables.append(_fraction_table(f"{data} data, few labels: {name}", heading, members))
    if not synthetic and not tables:
        column = COLUMNS[0]
        tables.append(_fraction_table(f"{data} data, few labels: {column.title}", f"{column.metric}, %", []))
    return tables


def _fraction_table(title: str, heading: str, groups: Sequence[ResultGroup]) -> Table:
    fractions = sorted({*TEMPLATE_FRACTIONS, *(g.first.fraction for g in groups)})
    rows: dict[tuple[object, ...], dict[float, ResultGroup]] = defaultdict(dict)
    for group in groups:
        rows[curve_key(group.first)].setdefault(group.first.fraction, group)
    rows = {key: found for key, found in rows.items() if any(fraction < 1 for fraction in found)}
    lines = [
        TableRow(f"{_origin(g)}, {g.first.mode}", _cells(fractions, found), False)
        for found in rows.values()
        for g in [next(iter(found.values()))]
    ]
    if not lines:
        lines = [TableRow(EMPTY, tuple(Cell(EMPTY) for _ in fractions), False)]
    columns = tuple((f"{100 * f:g} % of labels", heading) for f in fractions)
    return Table(title, columns, tuple(lines), "Share of the training labels that were used.")


def _cells(fractions: Sequence[float], found: Mapping[float, ResultGroup]) -> tuple[Cell, ...]:
    return tuple(
        Cell(found[f].score_text, anchor=found[f].anchor) if f in found else Cell(EMPTY) for f in fractions
    )


def curve_key(first: EvalResult) -> tuple[object, ...]:
    """What results on several fractions of the labels have in common."""
    weights = (first.encoder, first.weights, first.trained_on, first.checkpoint_step)
    return (*weights, first.mode, data_key(first), first.splits.get("test"))
