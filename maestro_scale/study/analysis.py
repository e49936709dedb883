"""Analyse a study: the mean score of each group of cells that differ in their seed, and a verdict per question.

Intervals are over seeds and tiles, see :mod:`maestro_scale.evaluation.paired`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from maestro_scale.evaluation.metric_kinds import METRIC_KINDS
from maestro_scale.evaluation.paired import Estimate, Run, difference, estimate, load_runs
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.study.config import Question, Study
from maestro_scale.study.records import CellRecord, EvaluationRecord
from maestro_scale.study.verdict import Verdict, adjust, judge

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """The mean score over seeds of one encoder, evaluated in one way. A row of the table."""

    dataset: str
    benchmark: str
    mode: str
    fraction: float
    levels: Mapping[str, str]
    baseline: str
    metric: str
    """Empty where no seed is finished."""
    seeds: tuple[int, ...]
    """Those that are finished."""
    num_planned: int
    """Seeds of the study."""
    mean: float | None = None
    deviation: float | None = None
    """Over seeds; None for fewer than two."""
    estimate: Estimate | None = None
    """None where no counts per tile are stored."""


@dataclass(frozen=True)
class Answer:
    """What the study says about one question on one dataset."""

    question: Question
    dataset: str
    benchmark: str
    metric: str
    better: tuple[str, ...]
    """Names of the cells whose mean is compared, finished on both sides."""
    worse: tuple[str, ...]
    num_missing: int
    """Cells of the question, on either side, without a result."""
    difference: Estimate | None
    """Of the means, better minus worse; of a metric that is better when lower, worse minus better."""
    verdict: Verdict


@dataclass(frozen=True)
class Cost:
    """Cost of one cell. None where it is not known, as of a cell that was not run."""

    cell: str
    seconds: float | None
    gpu_hours: float | None
    machines: tuple[str, ...] = ()
    """Threads and kind of device of its processes."""


@dataclass(frozen=True)
class StudyResult:
    """All that the pages of a study show."""

    study: Study
    scores: tuple[Score, ...]
    answers: tuple[Answer, ...]
    costs: tuple[Cost, ...]

    @property
    def mixed_machines(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Threads and devices by question and dataset, where the compared cells were not all run with the same."""
        by_cell = {cost.cell: cost.machines for cost in self.costs}
        found = {
            (a.question.name, a.dataset): sorted(
                {m for c in (*a.better, *a.worse) for m in by_cell.get(c, ())}
            )
            for a in self.answers
        }
        return {place: tuple(machines) for place, machines in found.items() if len(machines) > 1}


def analyse(study: Study, cells: Sequence[CellRecord]) -> StudyResult:
    """Scores and answers from the results that are there; missing ones are shown as missing."""
    store = _Results()
    answers = [answer for question in study.questions for answer in _answers(study, question, cells, store)]
    verdicts = adjust([answer.verdict for answer in answers])
    return StudyResult(
        study,
        tuple(_scores(cells, store)),
        tuple(
            dataclasses.replace(answer, verdict=verdict)
            for answer, verdict in zip(answers, verdicts, strict=True)
        ),
        tuple(
            Cost(
                cell.name,
                cell.seconds,
                None if cell.seconds is None else cell.gpus * cell.seconds / 3600,
                cell.machines,
            )
            # By name: cells whose levels make no difference share a directory.
            for _, cell in sorted({cell.name: cell for cell in cells}.items())
        ),
    )


class _Results:
    """Results by record, each read once; of counts only those that are needed."""

    def __init__(self) -> None:
        self._results: dict[EvaluationRecord, EvalResult | None] = {}

    def result(self, record: EvaluationRecord) -> EvalResult | None:
        """None where it is not finished, or cannot be read."""
        if record not in self._results:
            self._results[record] = None
            if record.path.exists():
                try:
                    self._results[record] = EvalResult.load(record.path)
                except EvaluationError as error:
                    log.warning("%s", error)
        return self._results[record]

    def runs(self, record: EvaluationRecord, seed: int, variant: str = "") -> list[Run]:
        """The counts of a finished record, one per fold. EvaluationError where there are none."""
        result = self.result(record)
        assert result is not None  # the caller has asked
        return [
            dataclasses.replace(run, seed=seed, variant=variant) for run in load_runs(record.path, result)
        ]


def _scores(cells: Sequence[CellRecord], store: _Results) -> Iterator[Score]:
    # By path: trials of a search may have the same values, and are the same cell then.
    groups: dict[tuple[object, ...], dict[Path, tuple[CellRecord, EvaluationRecord]]] = defaultdict(dict)
    for cell in cells:
        for record in cell.evaluations:
            place = (cell.dataset, record.benchmark, record.mode, record.fraction, cell.baseline)
            key = (*place, *sorted(cell.levels.items()))
            groups[key][record.path] = (cell, record)
    for members in groups.values():
        yield _score(sorted(members.values(), key=lambda m: m[0].seed), store)


def _score(members: Sequence[tuple[CellRecord, EvaluationRecord]], store: _Results) -> Score:
    cell, record = members[0]
    results = [(c.seed, r, found) for c, r in members if (found := store.result(r)) is not None]
    values = [result.value for _, _, result in results]
    estimated = None
    if results:
        try:
            estimated = estimate([run for seed, r, _ in results for run in store.runs(r, seed)])
        except EvaluationError as error:
            log.warning("%s %s: no interval: %s", cell.name, record.mode, error)
    return Score(
        cell.dataset,
        record.benchmark,
        record.mode,
        record.fraction,
        dict(cell.levels),
        cell.baseline,
        results[0][2].metric if results else "",
        tuple(seed for seed, _, _ in results),
        len(members),
        fmean(values) if values else None,
        stdev(values) if len(values) > 1 else None,
        estimated,
    )


def _answers(
    study: Study, question: Question, cells: Sequence[CellRecord], store: _Results
) -> Iterator[Answer]:
    """One answer per dataset of the question."""
    for dataset, benchmark, members in _places(question, cells):
        yield _answer(question, dataset, benchmark, members, store)


def _places(
    question: Question, cells: Sequence[CellRecord]
) -> Iterator[tuple[str, str, Sequence[CellRecord]]]:
    """(dataset, benchmark, cells) on which a question is asked."""
    datasets = dict.fromkeys(cell.dataset for cell in cells)
    for dataset in question.datasets or datasets:
        members = [cell for cell in cells if cell.dataset == dataset and not cell.baseline]
        benchmarks = [record.benchmark for cell in members for record in cell.evaluations]
        if benchmark := question.benchmark or next(iter(benchmarks), ""):
            yield dataset, benchmark, members


def unanswered(study: Study, cells: Sequence[CellRecord]) -> list[tuple[str, str]]:
    """(question, dataset) of the questions of which the study has no cell or evaluation on one of the sides."""
    return [
        (question.name, dataset)
        for question in study.questions
        for dataset, benchmark, members in _places(question, cells)
        if not all(_sides(question, benchmark, members))
    ]


def _sides(question: Question, benchmark: str, cells: Sequence[CellRecord]) -> tuple[_Side, _Side]:
    """The cells that a question compares, with their evaluations."""
    # A level that only one side names holds for the other side too: all else is equal.
    better = {**question.worse, **question.better}
    worse = {**question.better, **question.worse}
    return (
        _side(cells, better, question.mode, benchmark, question.fraction),
        _side(cells, worse, question.worse_mode or question.mode, benchmark, question.fraction),
    )


def _answer(
    question: Question, dataset: str, benchmark: str, cells: Sequence[CellRecord], store: _Results
) -> Answer:
    first, second = _sides(question, benchmark, cells)
    records = [*first.values(), *second.values()]
    num_missing = sum(store.result(record) is None for _, record in records)
    is_evaluated = bool(first and second)
    first, second = _compared(*_complete(first, second, store))
    metric = next((r.metric for _, record in records if (r := store.result(record)) is not None), "")
    estimated = None
    if first and second:
        try:
            higher, lower = _runs(first, store), _runs(second, store)
            if not METRIC_KINDS[metric].higher_is_better:  # a positive difference is an improvement
                higher, lower = lower, higher
            estimated = difference(higher, lower)
        except EvaluationError as error:
            log.warning("question %s: no difference: %s", question.name, error)
    return Answer(
        question,
        dataset,
        benchmark,
        metric,
        _names(first),
        _names(second),
        num_missing,
        estimated,
        _verdict(question, first, second, estimated) if is_evaluated else Verdict("not evaluated"),
    )


def _verdict(question: Question, first: _Side, second: _Side, found: Estimate | None) -> Verdict:
    if found is None:
        return Verdict("no result")
    if _names(first) == _names(second):  # levels that set what the recipe has anyway
        return Verdict("same cells")
    return judge(found, question.at_least, question.margin)


_Side = dict[tuple[str, int], tuple[CellRecord, EvaluationRecord]]
"""By the levels of factors that are not compared, as text, and the seed."""


def _side(
    cells: Iterable[CellRecord], levels: Mapping[str, str], mode: str, benchmark: str, fraction: float
) -> _Side:
    """The cells with these levels and their evaluations that a question is about."""
    # A level without pretraining is trained from scratch where the others are finetuned.
    modes = (mode, "scratch") if mode == "finetune" else (mode,)
    found: _Side = {}
    for cell, wanted in itertools.product(cells, modes):
        if any(cell.levels.get(factor) != level for factor, level in levels.items()):
            continue
        rest = json.dumps({f: level for f, level in sorted(cell.levels.items()) if f not in levels})
        for record in cell.evaluations:
            if (record.benchmark, record.mode, record.fraction) == (benchmark, wanted, fraction):
                found.setdefault((rest, cell.seed), (cell, record))
    return found


def _complete(first: _Side, second: _Side, store: _Results) -> tuple[_Side, _Side]:
    """The finished part of both sides: variants that both have, and seeds that all variants of a side have."""
    finished = [
        {place: found for place, found in side.items() if store.result(found[1]) is not None}
        for side in (first, second)
    ]
    variants = {variant for variant, _ in finished[0]} & {variant for variant, _ in finished[1]}
    complete = []
    for side in finished:
        seeds = {s for _, s in side if all((variant, s) in side for variant in variants)}
        complete.append({(v, s): found for (v, s), found in side.items() if v in variants and s in seeds})
    return complete[0], complete[1]


def _compared(first: _Side, second: _Side) -> tuple[_Side, _Side]:
    """Without the seeds that ``paired.difference`` leaves out: those of one side only, where both have several in
    common."""
    common = {seed for _, seed in first} & {seed for _, seed in second}
    if len(common) < 2:
        return first, second
    first, second = ({p: found for p, found in s.items() if p[1] in common} for s in (first, second))
    return first, second


def _runs(side: _Side, store: _Results) -> list[Run]:
    return [run for (variant, seed), (_, r) in side.items() for run in store.runs(r, seed, variant)]


def _names(side: _Side) -> tuple[str, ...]:
    return tuple(sorted(cell.name for cell, _ in side.values()))
