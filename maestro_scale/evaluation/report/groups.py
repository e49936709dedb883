"""Find results in folders, and group those that differ only in seed or fold."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from maestro_scale.evaluation.baselines.registry import UNTRAINED, has_published_weights, short_name
from maestro_scale.evaluation.results import ORACLE, RESULTS, EvalResult, EvaluationError

# Keys of a recipe's `train` that change the trained weights.
_TRAINING_KEYS = ("epochs", "steps", "global_batch", "precision")
FROZEN_MODES = ("knn", "probe", "attentive", ORACLE)
_DEFAULT_LOSS = {"class_weights": "none", "regression_loss": "l2"}


@dataclass(frozen=True)
class ResultFile:
    """A result and the path of its results.json."""

    path: Path
    result: EvalResult


@dataclass(frozen=True)
class ResultGroup:
    """Results that differ only in seed or fold, reported as one score."""

    files: tuple[ResultFile, ...]

    @property
    def first(self) -> EvalResult:
        """The first result: what all of them have in common can be read from it."""
        return self.files[0].result

    @property
    def name(self) -> str:
        """Encoder and mode, for legends."""
        if self.is_oracle:
            return "oracle"
        return f"{self.encoder}, {self.first.mode}"

    @property
    def encoder(self) -> str:
        """Name of the encoder without its folder."""
        return short_name(self.first.encoder) or "encoder"

    @property
    def is_oracle(self) -> bool:
        """Whether it is the oracle's score rather than an encoder's."""
        return self.first.mode == ORACLE

    @property
    def is_published(self) -> bool:
        """Whether the encoder is a baseline with weights that others published."""
        return has_published_weights(self.first.encoder) and self.first.mode != "scratch"

    @property
    def value(self) -> float:
        """Mean score over seeds and folds."""
        return fmean(self._values)

    @property
    def _values(self) -> list[float]:
        """A score per run."""
        runs = [[r.value for r in f.result.runs] or [f.result.value] for f in self.files]
        return [value for values in runs for value in values]

    @property
    def num_tiles(self) -> int:
        """Tiles that were scored. Seeds score the same tiles; folds and splits score others, which add up."""
        return sum(
            {(f.result.folds, f.result.splits.get("test")): f.result.num_tiles for f in self.files}.values()
        )

    @property
    def runs_text(self) -> str:
        """``3 seeds, 5 folds``; empty for a single run."""
        if len(self._values) == 1:
            return ""
        results = [f.result for f in self.files]
        counts = {
            "seeds": {s for r in results for s in r.seeds},
            "folds": {f for r in results for f in r.folds},
        }
        return ", ".join(f"{len(c)} {what}" for what, c in counts.items() if len(c) > 1) or "runs"

    @property
    def run_lines(self) -> list[tuple[str, str, Path]]:
        """(name of the run, its score, its results file) of every run."""
        lines = []
        for f in self.files:
            r = f.result
            runs = [(run.fold, run.seed, run.value, f.path.parent / run.path) for run in r.runs]
            for number, seed, value, path in runs or [
                (r.folds[0] if r.folds else None, r.seeds[0], r.value, f.path)
            ]:
                name = f"seed {seed}" if number is None else f"fold {number}, seed {seed}"
                lines.append((name, r.kind.number(value), path))
        return lines

    @property
    def score_text(self) -> str:
        """``78.8 ± 0.2`` over seeds and folds, or ``78.8 (77.9-79.6)`` with the bootstrap interval of the only run, or
        of runs that agree by construction (a method without random numbers has the same score for every seed)."""
        values, number = self._values, self.first.kind.number
        if len(set(values)) > 1:
            return f"{number(fmean(values))} ± {number(stdev(values))}"
        low, high = self.first.interval
        return f"{number(values[0])} ({number(low)}-{number(high)})"

    @property
    def kind(self) -> str:
        """``intra``: pretrained on the benchmark's dataset only; ``cross``: on other data, and every baseline with
        published weights; ``none``: not pretrained."""
        if self.is_published:
            return "cross"
        if not self.first.trained_on:
            return "none"
        return "intra" if self.first.trained_on == (self.first.benchmark,) else "cross"

    @property
    def anchor(self) -> str:
        """Id of its section in the report."""
        return "r" + hashlib.sha256(str(self.files[0].path).encode()).hexdigest()[:10]


def find_results(paths: Iterable[Path]) -> list[ResultFile]:
    """Every ``results.json`` among the files and under the folders. EvaluationError if a path has none or a bad one."""
    found: list[Path] = []
    for path in paths:
        # Not the copies that MLflow keeps beside the runs.
        below = (
            sorted(p for p in path.rglob(RESULTS) if "mlartifacts" not in p.relative_to(path).parts)
            if path.is_dir()
            else [path]
        )
        if not below:
            raise EvaluationError(f"{path}: no {RESULTS} in there; make one with evaluate.py --out {path}")
        found += below
    unique = dict.fromkeys(p.resolve() for p in found)
    loaded = [ResultFile(p, EvalResult.load(p)) for p in unique]
    # Results below a mean are its runs, or were those of an earlier evaluation into the same folder.
    means = {f.path.parent for f in loaded if f.result.runs}
    return [f for f in loaded if not means & set(f.path.parent.parents)]


def group_results(results: Sequence[ResultFile]) -> list[ResultGroup]:
    """Group results that differ only in seed or fold; of copies, only one is used.

    A result whose run is already in a group, with another score, starts another group: it comes from another training.
    """
    by_key: dict[tuple, list[list[ResultFile]]] = defaultdict(lambda: [[]])
    for file in results:
        groups = by_key[_group_key(file.result)]
        runs = _run_ids(file)
        if any(
            runs == _run_ids(other) and _is_copy(file.result, other.result)
            for group in groups
            for other in group
        ):
            continue
        group = next((g for g in groups if not any(runs & _run_ids(other) for other in g)), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(file)
    return [ResultGroup(tuple(group)) for groups in by_key.values() for group in groups]


def _group_key(r: EvalResult) -> tuple:
    """Everything but seed, fold and score. Splits of a cross-validation differ by fold, so they are left out there."""
    splits = None if r.folds else json.dumps(r.splits, sort_keys=True)
    question = (r.benchmark, r.metric, r.target, r.fraction, bool(r.folds), splits)
    return (
        *question,
        data_key(r),
        r.encoder,
        r.weights,
        r.trained_on,
        r.checkpoint_step,
        r.mode,
        _training_key(r),
    )


def data_key(r: EvalResult) -> str:
    """SHA-256 of the manifest of the benchmark's shards: datasets of one name may have different tiles."""
    return r.datasets.get(r.benchmark, "")


def _training_key(r: EvalResult) -> str:
    """The part of the recipe that determines a result, without the seed: the view of the dataset and, for a mode that
    trains, model and training."""
    recipe = _section(r.recipe)
    mixture = _section(recipe.get("data")).get("mixture")
    entry = _section(mixture[0] if isinstance(mixture, list) and mixture else None)
    evaluation = _section(recipe.get("evaluation"))
    # Keys that files of earlier revisions do not have: their default changes nothing.
    loss = {k: v for k in _DEFAULT_LOSS if (v := evaluation.pop(k, None)) not in (None, _DEFAULT_LOSS[k])}
    parts: list[Any] = [{k: v for k, v in entry.items() if k not in ("shards", "weight")}]
    if r.mode in FROZEN_MODES:
        parts += [recipe.get("model")] * (r.encoder in UNTRAINED)  # whose network is that of the recipe
    else:
        train = _section(recipe.get("train"))
        evaluation.pop("modes", None)
        optim, data = _section(recipe.get("optim")), _section(recipe.get("data"))
        for section, key, default in (
            (optim, "decay", "matrices"),
            (optim, "ema_epochs", 0),
            (evaluation, "ema_epochs", 0),
        ):
            if section.get(key) == default:
                del section[key]
        parts += [
            recipe.get("model"),
            optim,
            {k: train.get(k) for k in _TRAINING_KEYS},
            evaluation,
            data.get("flips"),
        ]
        # Revisions without the key began the bins of dates at either end.
        first_date = data.get("first_date", "ends")
        parts += [] if first_date == "ends" else ["first_date any"]
    return json.dumps(parts + [loss] * bool(loss), sort_keys=True, default=str)


def _section(value: object) -> dict[str, Any]:
    """A copy of a section of a recipe that was read from a file; empty where it is not a mapping."""
    return dict(value) if isinstance(value, Mapping) else {}


def _run_ids(f: ResultFile) -> set[tuple[int | None, int]]:
    """(fold, seed) of every run in a result."""
    r = f.result
    return {(run.fold, run.seed) for run in r.runs} or {(r.folds[0] if r.folds else None, r.seeds[0])}


def _is_copy(a: EvalResult, b: EvalResult) -> bool:
    return (a.value, a.per_class, a.interval, a.confusion) == (b.value, b.per_class, b.interval, b.confusion)
