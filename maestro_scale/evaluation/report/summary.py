"""Summarise the runs of one evaluation over seeds and folds as one result: mean and standard deviation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import TypeVar

import numpy as np

from maestro_scale.evaluation.results import EvalResult, RunScore, SensorScore

_T = TypeVar("_T")


def summarise(runs: Sequence[tuple[str, EvalResult]]) -> EvalResult:
    """The summary of (path, single run) pairs; of one pair, its result.

    Scores are means over runs, those per class over the runs whose test set has the class; pixel counts and timings are
    sums. Seeds score the same tiles, folds score different ones. The interval is the mean of the runs' intervals, which
    is conservative: the mean over runs varies less than a single run. Maps and recipe are the first run's; counts
    of tiles are stored with each run.
    """
    results = [result for _, result in runs]
    first = results[0]
    if len(results) == 1:
        return first
    confusions = [r.confusion for r in results if r.confusion is not None]
    tiles = {r.folds: r.num_tiles for r in results}
    return dataclasses.replace(
        first,
        value=fmean(r.value for r in results),
        deviation=stdev(r.value for r in results),
        interval=(fmean(r.interval[0] for r in results), fmean(r.interval[1] for r in results)),
        per_class=_means([r.per_class for r in results]),
        scores={k: v for k, v in _means([r.scores for r in results]).items() if v is not None},
        confusion=tuple(map(tuple, np.sum(confusions, axis=0).tolist())) if confusions else None,
        num_tiles=sum(tiles.values()),
        seeds=_distinct(s for r in results for s in r.seeds),
        folds=_distinct(f for r in results for f in r.folds),
        splits={
            role: _distinct(name for r in results for name in r.splits.get(role, ())) for role in first.splits
        },
        chosen={},
        counts=None,
        by_sensors={name: _mean_score([r.by_sensors[name] for r in results]) for name in first.by_sensors},
        timings={name: sum(r.timings.get(name, 0.0) for r in results) for name in first.timings},
        runs=tuple(
            RunScore(r.value, r.interval, r.seeds[0], r.folds[0] if r.folds else None, path)
            for path, r in runs
        ),
    )


def _mean_score(scores: Sequence[SensorScore]) -> SensorScore:
    """The mean of the runs' scores with the same kinds of sensors, as of the scores with all of them."""
    low, high = (fmean(s.interval[i] for s in scores) for i in (0, 1))
    return SensorScore(fmean(s.value for s in scores), (low, high), _means([s.per_class for s in scores]))


def _means(scores: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """By name, over the runs where it is defined; None if it is in no run."""
    means: dict[str, float | None] = {}
    for name in _distinct(name for s in scores for name in s):
        defined = [v for s in scores if (v := s.get(name)) is not None]
        means[name] = fmean(defined) if defined else None
    return means


def _distinct(items: Iterable[_T]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(items))
