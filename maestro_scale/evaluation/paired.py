"""Compare two sets of runs over seeds and tiles: the difference of mean scores, with an interval that covers both.

The model is that of a crossed two-way layout: the difference at one seed is effect + seed + tile + interaction, where
the contribution of a tile is its influence on the score. Three variances of the mean difference are estimated:

    V_seed   variance of the seeds' differences / S            estimates  σ²_seed / S + σ²_inter / (S·T)
    V_tile   variance of the tiles' mean influences / T        estimates  σ²_tile / T + σ²_inter / (S·T)
    V_inter  variance of the residuals of influences / (S·T)   estimates  σ²_inter / (S·T)

V = V_seed + V_tile - V_inter is then unbiased (two-way clustering, Cameron, Gelbach and Miller 2011; as the analysis of
variance of a two-way layout without replication). It is taken to be at least the larger of V_seed and V_tile. The
interval is t-distributed with Satterthwaite's degrees of freedom (1946): few seeds estimate their own variance badly.
``benchmarks/study_coverage.py`` measures its coverage.

Shapes: S seeds, T tiles of a test split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maestro_scale.errors import shorten
from maestro_scale.evaluation.bootstrap import Statistic
from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.metric_kinds import MAX_SCORE
from maestro_scale.evaluation.metrics import STATISTICS
from maestro_scale.evaluation.results import EvalResult, EvaluationError, RunScore

LEVEL = 0.95
_CHUNK_BYTES = 64 * 2**20  # of counts whose statistic is computed at once


@dataclass(frozen=True)
class Run:
    """The counts of one run: a seed, on one fold or without folds."""

    metric: str
    seed: int
    fold: int | None
    counts: TileCounts
    variant: str = ""
    """Scores of several variants, e.g. of a factor that is not compared, are averaged."""
    data: str = ""
    """Digest of the manifest: tiles of other data may have the same keys. Empty where it is not known."""


@dataclass(frozen=True)
class Component:
    """An estimated variance of the mean, and its degrees of freedom."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Estimate:
    """A mean score or the difference of two, with its interval over seeds and tiles."""

    value: float
    seed: Component
    tile: Component
    inter: Component
    num_seeds: tuple[int, ...]
    """Of each set of runs; one number where both have the same seeds."""
    num_tiles: int
    pairs_seeds: bool
    pairs_tiles: bool
    level: float = LEVEL

    @property
    def total(self) -> Component:
        """Of ``value``, over seeds and tiles."""
        unbiased = self.seed.variance + self.tile.variance - self.inter.variance
        largest = max(self.seed, self.tile, key=lambda c: c.variance)
        if unbiased <= largest.variance:
            return largest
        parts = (self.seed, self.tile, self.inter)
        return Component(unbiased, unbiased**2 / sum(c.variance**2 / c.freedom for c in parts))

    @property
    def error(self) -> float:
        """Standard error."""
        return math.sqrt(self.total.variance)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the error."""
        return self.total.freedom

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return self.error * t_quantile((1 + self.level) / 2, self.freedom)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half_width

    @property
    def covers_seeds(self) -> bool:
        """Whether every set has several seeds; else the interval covers tiles only."""
        return min(self.num_seeds) > 1

    def p_value(self, other: float = 0.0) -> float:
        """Two-sided p value of the hypothesis that the true value is ``other``."""
        distance = abs(self.value - other)
        if not self.error:
            return float(distance == 0)
        return 2 * t_tail(distance / self.error, self.freedom)


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t distribution."""
    from scipy.special import ndtri, stdtrit  # here: every rank of a training imports this package

    return float(ndtri(probability) if math.isinf(freedom) else stdtrit(freedom, probability))


def t_tail(value: float, freedom: float) -> float:
    """Probability of Student's t distribution above ``value``."""
    from scipy.special import ndtr, stdtr

    return float(ndtr(-value) if math.isinf(freedom) else stdtr(freedom, -value))


def load_runs(path: Path, result: EvalResult) -> list[Run]:
    """The counts of a result and ``path`` of its JSON file, one run per seed and fold. EvaluationError as of
    ``EvalResult.load_counts``, where the counts do not give the score of their result, and where a run is not the one
    that a mean was computed from."""
    if not result.runs:
        return [_load_run(path, result, result.seeds[0], result.folds[0] if result.folds else None)]
    found = []
    for score in result.runs:
        of_run = path.parent / score.path
        if not of_run.resolve().is_relative_to(path.parent.resolve()):
            raise EvaluationError(f"{path}: the path of a run, {shorten(score.path)}, is not below it")
        run = EvalResult.load(of_run)
        if not _is_run(run, score, result):
            raise EvaluationError(
                f"{of_run} is not the run that {path} is a mean of (seed {score.seed}, score {score.value:.6g}): "
                "evaluate again"
            )
        found.append(_load_run(of_run, run, score.seed, score.fold))
    return found


def _is_run(run: EvalResult, score: RunScore, mean: EvalResult) -> bool:
    """Whether a result is the run that a mean recorded: another evaluation may have replaced it."""
    same = ("benchmark", "metric", "mode", "target", "encoder", "weights", "datasets", "fraction")
    return (
        run.value == score.value
        and run.seeds == (score.seed,)
        and run.folds == (() if score.fold is None else (score.fold,))
        and all(getattr(run, name) == getattr(mean, name) for name in same)
    )


def _load_run(path: Path, result: EvalResult, seed: int, fold: int | None) -> Run:
    counts = result.load_counts(path)
    value = _score(STATISTICS[result.metric], _total(counts.array))
    if not math.isclose(value, result.value, rel_tol=1e-6, abs_tol=1e-9):
        raise EvaluationError(f"{path}: its counts give the score {value:.6g}, not {result.value:.6g}")
    return Run(result.metric, seed, fold, counts, data=result.datasets.get(result.benchmark, ""))


def estimate(runs: Sequence[Run], level: float = LEVEL) -> Estimate:
    """The mean score over seeds and folds. EvaluationError where the runs are not one per seed and fold."""
    arm = _arm(runs)
    return Estimate(
        float(arm.values.mean()),
        seed=_sum([_mean_variance(arm.values)]),
        tile=_sum(_tile_parts(arm.tile_means)),
        inter=_sum(_inter_parts(arm.influences)),
        num_seeds=(len(arm.seeds),),
        num_tiles=arm.num_tiles,
        pairs_seeds=False,
        pairs_tiles=False,
        level=level,
    )


def difference(a: Sequence[Run], b: Sequence[Run], level: float = LEVEL) -> Estimate:
    """Mean score of ``a`` minus that of ``b``.

    Where both have two or more seeds in common, only these are used, in pairs; otherwise all seeds, as independent.
    Tiles are paired by their keys where both were scored on the same ones of the same data. EvaluationError where the
    metrics differ, or the runs are not one per seed and fold.
    """
    if len({r.metric for r in (*a, *b)}) != 1:
        raise EvaluationError("results of different metrics cannot be compared")
    common = {r.seed for r in a} & {r.seed for r in b}
    pairs_seeds = len(common) > 1
    if pairs_seeds:
        a, b = ([r for r in runs if r.seed in common] for runs in (a, b))
    first, second = _arm(a), _arm(b)
    aligned = _align(second, first.keys) if len({r.data for r in (*a, *b)} - {""}) < 2 else None
    pairs_tiles = aligned is not None
    second = aligned or second
    arms = (first, second)
    seeds = [first.values - second.values] if pairs_seeds else [arm.values for arm in arms]
    tiles = (
        [_subtract(first.tile_means, second.tile_means)] if pairs_tiles else [arm.tile_means for arm in arms]
    )
    # An interaction is one variable for both arms only where the same seed meets the same tile.
    both = pairs_seeds and pairs_tiles
    inter = [_subtract(first.influences, second.influences)] if both else [arm.influences for arm in arms]
    return Estimate(
        float(first.values.mean() - second.values.mean()),
        seed=_sum([_mean_variance(values) for values in seeds]),
        tile=_sum([part for means in tiles for part in _tile_parts(means)]),
        inter=_sum([part for matrices in inter for part in _inter_parts(matrices)]),
        num_seeds=(len(first.seeds),) if pairs_seeds else (len(first.seeds), len(second.seeds)),
        num_tiles=min(arm.num_tiles for arm in arms),
        pairs_seeds=pairs_seeds,
        pairs_tiles=pairs_tiles,
        level=level,
    )


def influences(statistic: Statistic, counts: np.ndarray) -> tuple[float, np.ndarray]:
    """(score, influence (T,) of each tile on it) of counts (T, …); over test sets the variance of the score is that of
    the influences divided by T.

    The infinitesimal jackknife (Jaeckel 1972; Efron 1982, chapter 6), whose derivative is taken by counting a tile
    twice: no class loses its last tile, as when one is left out.
    """
    total = _total(counts)
    value = _score(statistic, total)
    size = max(_CHUNK_BYTES // max(total.nbytes, 1), 1)
    chunks = (counts[first : first + size] for first in range(0, len(counts), size))
    raised = np.concatenate([statistic(total + chunk) for chunk in chunks])
    if not (np.abs(raised) <= MAX_SCORE).all():  # also of NaN
        raise EvaluationError("the counts of a tile are not those of the metric")
    return value, (len(counts) + 1) * (raised - value)


def _total(counts: np.ndarray) -> np.ndarray:
    return counts.sum(axis=0, dtype=np.float64 if counts.dtype.kind == "f" else np.int64)


def _score(statistic: Statistic, total: np.ndarray) -> float:
    try:
        value = float(statistic(total))
    except (ValueError, IndexError, TypeError):  # a file that is wrong
        raise EvaluationError(f"counts of shape {total.shape} per tile are not those of the metric") from None
    if abs(value) > MAX_SCORE:
        raise EvaluationError(f"the counts give {value:g}, too large for a score")
    if not math.isfinite(value):
        raise EvaluationError("no label of the test tiles counts, so there is no score to compare")
    return value


Matrices = Mapping[int | None, np.ndarray]
"""By fold."""


@dataclass(frozen=True)
class _Arm:
    """One set of runs. ``values``: (S,) mean scores over folds; ``influences``: (S, T) on them, and ``keys`` (T,) by
    fold."""

    seeds: tuple[int, ...]
    values: np.ndarray
    influences: Matrices
    keys: Mapping[int | None, tuple[str, ...]]

    @property
    def num_tiles(self) -> int:
        return sum(map(len, self.keys.values()))

    @property
    def tile_means(self) -> Matrices:
        """(T,) influences on the mean over seeds."""
        return {fold: matrix.mean(axis=0) for fold, matrix in self.influences.items()}


def _arm(runs: Sequence[Run]) -> _Arm:
    table = {(r.seed, r.fold, r.variant): r for r in runs}
    seeds = tuple(sorted({r.seed for r in runs}))
    folds = sorted({r.fold for r in runs}, key=lambda fold: -1 if fold is None else fold)
    variants = sorted({r.variant for r in runs})
    if not runs or len(table) != len(runs) or len(table) != len(seeds) * len(folds) * len(variants):
        raise EvaluationError("the runs are not one per seed and fold, so they have no common mean")
    if len({r.data for r in runs} - {""}) > 1:  # the keys of its tiles may be the same
        raise EvaluationError(
            "the seeds of one result were scored on different data: evaluate the older ones again"
        )
    statistic = STATISTICS[runs[0].metric]
    values, matrices, keys = np.zeros(len(seeds)), {}, {}
    share = 1 / (len(folds) * len(variants))
    for fold in folds:
        keys[fold] = table[seeds[0], fold, variants[0]].counts.keys
        matrices[fold] = np.zeros((len(seeds), len(keys[fold])))
        for (number, seed), variant in itertools.product(enumerate(seeds), variants):
            counts = table[seed, fold, variant].counts
            rows = _rows(counts.keys, keys[fold])
            if rows is None:
                raise EvaluationError("the seeds of one result were scored on different tiles")
            value, influence = influences(statistic, counts.array[rows])
            values[number] += share * value
            matrices[fold][number] += share * influence
    return _Arm(seeds, values, matrices, keys)


def _align(arm: _Arm, keys: Mapping[int | None, tuple[str, ...]]) -> _Arm | None:
    """The arm with its tiles in the order of ``keys``; None where it has other tiles."""
    if arm.keys.keys() != keys.keys():
        return None
    matrices = {}
    for fold, wanted in keys.items():
        rows = _rows(arm.keys[fold], wanted)
        if rows is None:
            return None
        matrices[fold] = arm.influences[fold][:, rows]
    return _Arm(arm.seeds, arm.values, matrices, keys)


def _rows(keys: Sequence[str], wanted: Sequence[str]) -> np.ndarray | None:
    """Where each of ``wanted`` is among ``keys``; None where these are not the same, or a key occurs twice in another
    order."""
    if tuple(keys) == tuple(wanted):
        return np.arange(len(keys))
    at = {key: row for row, key in enumerate(keys)}
    if len(at) != len(keys) or len(keys) != len(wanted) or at.keys() != set(wanted):
        return None
    return np.array([at[key] for key in wanted])


def _subtract(a: Matrices, b: Matrices) -> Matrices:
    return {fold: a[fold] - b[fold] for fold in a}


def _mean_variance(values: np.ndarray) -> Component:
    """Of the mean of independent values; 0 where there is only one."""
    if len(values) < 2:
        return Component(0.0, math.inf)
    return Component(float(values.var(ddof=1)) / len(values), len(values) - 1)


def _tile_parts(means: Matrices) -> list[Component]:
    """Folds have disjoint tiles, so their variances add up."""
    return [_mean_variance(of_fold) for of_fold in means.values()]


def _inter_parts(matrices: Matrices) -> list[Component]:
    parts = []
    for matrix in matrices.values():
        freedom = (matrix.shape[0] - 1) * (matrix.shape[1] - 1)
        if freedom:
            rest = matrix - matrix.mean(axis=0) - matrix.mean(axis=1, keepdims=True) + matrix.mean()
            parts.append(Component(float((rest**2).sum()) / freedom / matrix.size, freedom))
    return parts


def _sum(parts: Sequence[Component]) -> Component:
    """The variance of a sum of independent means, with Satterthwaite's degrees of freedom."""
    variance = sum(p.variance for p in parts)
    if not variance:
        return Component(0.0, math.inf)
    return Component(variance, variance**2 / sum(p.variance**2 / p.freedom for p in parts))
