"""The format of ``results.json``: a score with its provenance, interval and the scores of its runs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError, shorten
from maestro_scale.evaluation.counts import FILE as COUNTS
from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.metric_kinds import MAX_SCORE, METRIC_KINDS, UNBOUNDED_SCORES, MetricKind
from maestro_scale.training.run_dir import write_atomically

VERSION = 1
RESULTS = "results.json"
MAPS = "maps.npz"
ORACLE = "oracle"  # the mode, and the name of the baseline
METRICS = tuple(METRIC_KINDS)
_FILES = ("maps", "counts")  # attributes that are in files of their own


class EvaluationError(MaestroError):
    """An evaluation is impossible as requested, or a results file cannot be used."""


@dataclass(frozen=True)
class RunScore:
    """The score of one run (a seed and fold) in the result of several."""

    value: float
    interval: tuple[float, float]
    seed: int
    fold: int | None = None
    path: str = ""
    """Of the results.json of the run, relative to that of the mean."""


@dataclass(frozen=True)
class SensorScore:
    """The oracle's score with some kinds of sensors alone."""

    value: float
    interval: tuple[float, float]
    per_class: Mapping[str, float | None]


@dataclass(frozen=True)
class Architecture:
    """Of the encoder of a MAESTRO: what decides which models it can be compared with. Fields as of ``Size`` and
    ``ModelConfig``."""

    width: int
    depth: int
    heads: int
    dim_head: int
    mlp_ratio: int
    fusion: str
    inter_depth: int
    spectral: str = "joint"
    norm: str = "group"


@dataclass(frozen=True)
class EvalResult:
    """A score of one encoder on one benchmark. Scores are fractions of 1, not percent; those of a regression are in
    ``units``."""

    benchmark: str
    """Name of the dataset or benchmark, e.g. ``treesatai_ts``."""
    metric: str
    """One of :data:`METRICS`: ``wf1`` (multilabel, classification), ``miou`` (segmentation), ``rmse`` (regression)."""
    mode: str
    """``knn``, ``probe``, ``attentive``, ``finetune``, ``scratch``, ``test`` (of a finetuned model) or ``oracle``."""
    value: float
    """The score; the mean over ``runs`` where there are several."""
    per_class: Mapping[str, float | None]
    """Score per class name; None where the class is in no target; empty for a regression."""
    interval: tuple[float, float]
    """Bootstrap interval (low, high) over tiles, at 95 %; of several runs the mean of their intervals."""
    num_tiles: int
    """Samples that were scored; the sum over folds."""
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Pixels (segmentation) or tiles (classification) by (target, predicted) class; summed over runs."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Other scores by name, fractions of 1 except ``metric_kinds.UNBOUNDED_SCORES``: see
    ``metrics.segmentation_scores``, ``metrics.classification_scores``, ``regression_metrics.regression_scores`` and
    ``tasks.task.multilabel_predictions``."""
    seeds: tuple[int, ...] = (0,)
    """One fit per seed."""
    folds: tuple[int, ...] = ()
    """Folds of cross-validation, from 1; empty without cross-validation."""
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Splits in shards by role (``train``, ``val``, ``test``); of several folds all that had the role."""
    deviation: float | None = None
    """Standard deviation of ``value`` over ``runs`` (n - 1 in the denominator); None for a single run."""
    runs: tuple[RunScore, ...] = ()
    """The runs that ``value`` is the mean of; empty for a single run."""
    target: str = ""
    """Name in the shards of the target that was predicted."""
    units: str = ""
    """Of ``value``, ``interval``, ``deviation``, ``mae`` and ``bias`` of a regression; empty for other targets, whose
    scores are fractions of 1, and where the dataset states none."""
    synthetic: bool | None = None
    """Whether the tiles are synthetic scenes; None where the manifest does not say (written by earlier revisions, or by
    other code than ``maestro-scale shard``)."""
    encoder: str = ""
    """What was evaluated, as named on the command line: a run, a checkpoint, an exported model or a baseline."""
    weights: str = ""
    """SHA-256 of the checkpoint's model configuration and weights, or of the local files that a baseline names; empty
    for other baselines, for a checkpoint per fold, and in files of earlier revisions."""
    adaptation: str = ""
    """How an external encoder adapts bands, resolution and dates of the benchmark; empty for others, and in files of
    earlier revisions."""
    architecture: Architecture | None = None
    """Of the MAESTRO that was evaluated, whatever the recipe says; None for other encoders, and in files of earlier
    revisions."""
    trained_on: tuple[str, ...] = ()
    """Datasets the encoder was pretrained on; empty if it was not."""
    fraction: float = 1.0
    """Share of the training labels that were used."""
    checkpoint_step: int | None = None
    """Optimizer steps the encoder was trained for; None where that is unknown, 0 for an untrained one."""
    datasets: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the manifest by dataset; empty in files of earlier revisions."""
    recipe: Mapping[str, Any] | None = None
    """The resolved recipe, as plain values."""
    chosen: Mapping[str, float] = field(default_factory=dict)
    """Hyperparameters selected on validation; empty for several runs."""
    by_sensors: Mapping[str, SensorScore] = field(default_factory=dict)
    """Of the oracle: its score by set of sensors (``optical``, ``radar+image``, …); empty for encoders."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds spent, by part."""
    counts_sha256: str = field(default="", compare=False)
    """SHA-256 of the ``counts.npz`` beside the JSON file; empty for several runs, each of which has its own, and in
    files of earlier revisions."""
    version: int = VERSION
    """Version of this format."""
    maps: Mapping[str, np.ndarray] | None = field(default=None, compare=False, repr=False)
    """``truth`` (labels) and ``answer`` (predictions) of a few tiles, (n, H, W) uint8, or float32 of a
    regression. Written to ``maps.npz`` next to the JSON file; ``load`` does not read them."""
    counts: TileCounts | None = field(default=None, compare=False, repr=False)
    """Counts of each tile, of a single run. Written to ``counts.npz``, which ``load_counts`` reads."""

    def write(self, path: Path) -> None:
        """Write as JSON, atomically. ValueError if a score is not finite."""
        for name, value in self._numbers().items():
            if not math.isfinite(value):
                raise ValueError(f"{self.benchmark} {self.mode}: {name} is {value}; undefined must be None")
        values = dataclasses.asdict(dataclasses.replace(self, maps=None, counts=None))
        for name in _FILES:
            values.pop(name)
        values["counts_sha256"] = ""
        # Those of an earlier result must not be shown with this one, nor these with it if this process is killed.
        (path.parent / MAPS).unlink(missing_ok=True)
        # Before the JSON file, whose presence says that the evaluation has ended. Counts beside another result, after a
        # kill between the two writes, are noticed by their hash.
        if self.counts is not None:
            content = self.counts.dumps()
            values["counts_sha256"] = hashlib.sha256(content).hexdigest()
            write_atomically(path.parent / COUNTS, content)
        else:
            (path.parent / COUNTS).unlink(missing_ok=True)
        write_atomically(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
        if self.maps is not None:
            archive = io.BytesIO()
            arrays: dict[str, Any] = dict(self.maps)  # Any: numpy's stubs take keywords for its options too
            np.savez_compressed(archive, **arrays)
            write_atomically(path.parent / MAPS, archive.getvalue())

    @classmethod
    def load(cls, path: Path) -> EvalResult:
        """Read a file of ``write``. EvaluationError if it is missing, malformed or of another version."""
        try:
            values = untrusted.load_json(untrusted.read_bytes(path))
        except (OSError, untrusted.InputError) as error:
            if not path.exists():
                raise EvaluationError(
                    f"{path} does not exist; give a results.json, or a folder with some"
                ) from None
            raise EvaluationError(f"{path} cannot be read ({error}); evaluate again to write it") from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise EvaluationError(
                f"{path} has format version {shorten(version)}, this maestro-scale reads {VERSION}: "
                "evaluate again, or read it with the maestro-scale that wrote it"
            )
        known = {f.name for f in dataclasses.fields(cls)} - set(_FILES)
        required = {f.name for f in dataclasses.fields(cls) if _is_required(f)}
        wrong = sorted((set(values) - known) | (required - set(values)))
        if wrong:
            names = ", ".join(name if name in required else shorten(name) for name in wrong[:10])
            raise EvaluationError(
                f"{path} lacks required fields or has unknown ones: {names}; evaluate again"
            )
        try:
            result = untrusted.from_builtins(cls, values)
        except untrusted.InputError as error:
            raise EvaluationError(f"{path} is malformed ({error}); evaluate again") from error
        if (problem := next(result._problems(), None)) is not None:
            raise EvaluationError(f"{path} is malformed: {problem}; evaluate again")
        return result

    def load_counts(self, path: Path) -> TileCounts:
        """The counts of a single run. ``path``: of its JSON file. EvaluationError if there are none, as in results of
        earlier revisions, or they are malformed or those of another result."""
        file = path.parent / COUNTS
        if not self.counts_sha256:
            raise EvaluationError(f"{path} has no counts per tile; evaluate again to write {COUNTS}")
        try:
            content = untrusted.read_bytes(file)
            if hashlib.sha256(content).hexdigest() != self.counts_sha256:
                raise untrusted.InputError("is not the file of this result")
            counts = TileCounts.loads(content)
        except (OSError, untrusted.InputError) as error:
            raise EvaluationError(f"{file} cannot be read ({error}); evaluate again to write it") from error
        if len(counts.keys) != self.num_tiles:
            raise EvaluationError(
                f"{file} has {len(counts.keys)} tiles, {path} {self.num_tiles}; evaluate again"
            )
        return counts

    def _problems(self) -> Iterator[str]:
        """What is invalid in this result."""
        if self.metric not in METRICS:
            yield f"metric {shorten(self.metric)} is not one of {', '.join(METRICS)}"
            return
        for name, value in self._fractions().items():
            if not 0 <= value <= 1:
                yield f"{name} is {value!r}, not a fraction of 1"
        for name, value in self._numbers().items():
            if not math.isfinite(value):
                yield f"{name} is {value!r}, not a finite number"
        for name, value in (self._numbers() | self._numbers_of_runs()).items():
            # R² is a ratio of squares, and only averaged.
            if abs(value) > (MAX_SCORE**4 if name.startswith("score ") else MAX_SCORE):
                yield f"{name} is {value!r}, too large for a score"
        if not self.seeds:
            yield "no seed"
        if _num_entries(self.recipe, untrusted.RECIPE.entries) > untrusted.RECIPE.entries:
            yield f"the recipe has more than {untrusted.RECIPE.entries} entries"
        num_classes = len(self.per_class)
        if self.confusion is not None and {len(self.confusion), *map(len, self.confusion)} != {num_classes}:
            yield f"the confusion has {len(self.confusion)} rows for {num_classes} classes"

    @property
    def kind(self) -> MetricKind:
        """The properties of its metric."""
        return METRIC_KINDS[self.metric]

    def _fractions(self) -> dict[str, float]:
        """The numbers that must be in 0 to 1."""
        scores = {f"score {name}" for name in UNBOUNDED_SCORES}
        if not self.kind.is_fraction:
            scores |= {"value", "interval low", "interval high"}
        return {name: value for name, value in self._numbers().items() if name not in scores}

    def _numbers(self) -> dict[str, float]:
        named = {"value": self.value, "interval low": self.interval[0], "interval high": self.interval[1]}
        scores = {f"per-class score of {k}": v for k, v in self.per_class.items() if v is not None}
        for sensors, score in self.by_sensors.items():
            numbers = (score.value, *score.interval, *(v for v in score.per_class.values() if v is not None))
            scores |= {f"number {i} of {sensors}": v for i, v in enumerate(numbers)}
        return named | scores | {f"score {k}": v for k, v in self.scores.items()}

    def _numbers_of_runs(self) -> dict[str, float]:
        numbers = [(score.value, *score.interval) for score in self.runs]
        named = {
            f"number {i} of run {number}": v for number, of in enumerate(numbers) for i, v in enumerate(of)
        }
        return named if self.deviation is None else {**named, "deviation": self.deviation}


def _num_entries(document: Any, stop: int) -> int:
    """Keys and list items of a document; counted up to a few more than ``stop``."""
    count, level = 0, [document]
    while level and count <= stop:
        parts = [part.values() if isinstance(part, Mapping) else part for part in level]
        level = [
            item
            for part in parts
            if not isinstance(part, str) and isinstance(part, Iterable)
            for item in part
        ]
        count += len(level)
    return count


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
