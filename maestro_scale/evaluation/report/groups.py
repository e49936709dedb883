"""Results that are runs of one thing, found in folders and put together."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from maestro_scale.evaluation.results import ORACLE, RESULTS, EvalResult, ResultsError

IMAGE = "image:"  # begins the name of a baseline that comes with weights of its own

# What of a recipe's `train` changes what is learned.
_TRAINING_KEYS = ("epochs", "steps", "global_batch", "precision")
_FROZEN = ("knn", "probe", "attentive", ORACLE)


@dataclass(frozen=True)
class ResultFile:
    """A result and where it lies."""

    path: Path
    result: EvalResult


@dataclass(frozen=True)
class ResultGroup:
    """Results that differ in nothing but the seed (or the fold): one number."""

    files: tuple[ResultFile, ...]

    @property
    def first(self) -> EvalResult:
        """A representative."""
        return self.files[0].result

    @property
    def name(self) -> str:
        """Encoder and mode, for legends."""
        if self.is_oracle:
            return "oracle"
        return f"{self.encoder}, {self.first.mode}"

    @property
    def encoder(self) -> str:
        """Its name without the folders it lies in."""
        return Path(self.first.encoder).name or "encoder"

    @property
    def is_oracle(self) -> bool:
        """Not an encoder's score, but what can be reached."""
        return self.first.mode == ORACLE

    @property
    def is_image(self) -> bool:
        """Of an encoder of ordinary images, with the weights it came with."""
        return self.first.encoder.startswith(IMAGE) and self.first.mode != "scratch"

    @property
    def value(self) -> float:
        """Mean over seeds and folds."""
        return fmean(self._values)

    @property
    def _values(self) -> list[float]:
        """A score per run."""
        runs = [[r.value for r in f.result.runs] or [f.result.value] for f in self.files]
        return [value for values in runs for value in values]

    @property
    def num_tiles(self) -> int:
        """Tiles that were scored: those of another fold, or another split, are others."""
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
        """(which run, its score, its results file) of every run."""
        lines = []
        for f in self.files:
            r = f.result
            runs = [(run.fold, run.seed, run.value, f.path.parent / run.path) for run in r.runs]
            for number, seed, value, path in runs or [
                (r.folds[0] if r.folds else None, r.seeds[0], r.value, f.path)
            ]:
                which = f"seed {seed}" if number is None else f"fold {number}, seed {seed}"
                lines.append((which, f"{100 * value:.1f}", path))
        return lines

    @property
    def score_text(self) -> str:
        """``78.8 ± 0.2`` over seeds and folds, or ``78.8 (77.9-79.6)`` with the bootstrap interval of the only run."""
        values = [100 * value for value in self._values]
        if len(values) > 1:
            return f"{fmean(values):.1f} ± {stdev(values):.1f}"
        low, high = self.first.interval
        return f"{values[0]:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    @property
    def kind(self) -> str:
        """``intra``: pretrained on the benchmark's own data; ``cross``: on other data, ordinary images included;
        ``none``: not at all."""
        if self.is_image:
            return "cross"
        if not self.first.trained_on:
            return "none"
        return "intra" if self.first.trained_on == (self.first.benchmark,) else "cross"

    @property
    def anchor(self) -> str:
        """Where the report tells more of it."""
        return "r" + hashlib.sha256(str(self.files[0].path).encode()).hexdigest()[:10]


def find_results(paths: Iterable[Path]) -> list[ResultFile]:
    """Every ``results.json`` among the files and under the folders. ResultsError if a path has none, or one is bad."""
    found: list[Path] = []
    for path in paths:
        here = sorted(path.rglob(RESULTS)) if path.is_dir() else [path]
        if not here:
            raise ResultsError(f"{path}: no {RESULTS} in there; make one with evaluate.py --out {path}")
        found += here
    unique = dict.fromkeys(p.resolve() for p in found)
    loaded = [ResultFile(p, EvalResult.load(p)) for p in unique]
    # What lies in the folder of a mean is, or was, one of its runs.
    means = {f.path.parent for f in loaded if f.result.runs}
    return [f for f in loaded if not means & set(f.path.parent.parents)]


def group_results(found: Sequence[ResultFile]) -> list[ResultGroup]:
    """Runs of one thing as one: what differs in more than the seed or the fold is another, and of copies one counts."""
    groups: dict[tuple, list[list[ResultFile]]] = defaultdict(lambda: [[]])
    for f in found:
        parts = groups[_group_key(f.result)]
        if any(
            _run_ids(f) == _run_ids(other) and _is_copy(f.result, other.result)
            for part in parts
            for other in part
        ):
            continue
        mine = _run_ids(f)
        part = next((p for p in parts if not any(mine & _run_ids(other) for other in p)), None)
        if part is None:
            parts.append(part := [])
        part.append(f)
    return [ResultGroup(tuple(part)) for parts in groups.values() for part in parts]


def _group_key(r: EvalResult) -> tuple:
    splits = None if r.folds else json.dumps(r.splits, sort_keys=True)
    asked = (r.benchmark, r.metric, r.target, r.fraction, bool(r.folds), splits)
    return (*asked, r.encoder, r.trained_on, r.checkpoint_step, r.mode, _training_key(r))


def _training_key(r: EvalResult) -> str:
    """What of the recipe makes a result, but for the seed: how the tiles are seen and, if it is trained, how."""
    recipe: dict[str, Any] = dict(r.recipe or {})
    seen = dict(next(iter((recipe.get("data") or {}).get("mixture") or [{}])))
    parts = [{k: v for k, v in seen.items() if k not in ("shards", "weight")}]
    if r.mode not in _FROZEN:
        train, evaluation = recipe.get("train") or {}, dict(recipe.get("evaluation") or {})
        evaluation.pop("modes", None)
        parts += [
            recipe.get("model"),
            recipe.get("optim"),
            {k: train.get(k) for k in _TRAINING_KEYS},
            evaluation,
        ]
    return json.dumps(parts, sort_keys=True, default=str)


def _run_ids(f: ResultFile) -> set[tuple[int | None, int]]:
    """(fold, seed) of every run in a result."""
    r = f.result
    return {(run.fold, run.seed) for run in r.runs} or {(r.folds[0] if r.folds else None, r.seeds[0])}


def _is_copy(a: EvalResult, b: EvalResult) -> bool:
    return (a.value, a.per_class, a.interval, a.confusion) == (b.value, b.per_class, b.interval, b.confusion)
