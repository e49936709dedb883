"""One score with everything needed to trust it, as ``results.json``."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.errors import MaestroError
from maestro_scale.training.run_dir import write_atomically

VERSION = 1
RESULTS = "results.json"
MAPS = "maps.npz"
ORACLE = "oracle"  # the mode, and the name of the baseline
METRICS = ("wf1", "miou")


class ResultsError(MaestroError):
    """A results file cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class RunScore:
    """One of the runs, over seeds and folds, whose mean a result is."""

    value: float
    interval: tuple[float, float]
    seed: int
    fold: int | None = None
    path: str = ""
    """Its own results.json, relative to that of the mean."""


@dataclass(frozen=True)
class EvalResult:
    """A score of one encoder on one benchmark. Scores are fractions of 1, not percent."""

    benchmark: str
    """Name of the dataset or benchmark, e.g. ``treesatai_ts``."""
    metric: str
    """``wf1`` or ``miou``."""
    mode: str
    """``knn``, ``probe``, ``attentive``, ``finetune``, ``scratch`` or ``oracle``."""
    value: float
    """The score; the mean over ``runs`` where there are several."""
    per_class: Mapping[str, float | None]
    """Score per class name; None where the class is in no target."""
    interval: tuple[float, float]
    """Bootstrap interval (low, high) over tiles, at 95 %; of several runs the mean of theirs."""
    num_tiles: int
    """Samples that were scored; of several folds all of them."""
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Pixels by (target, predicted) class, for segmentation; summed over runs."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Other scores by name, fractions of 1: see ``metrics.segmentation_scores`` and ``tasks.Multilabel``."""
    seeds: tuple[int, ...] = (0,)
    """One fit per seed."""
    folds: tuple[int, ...] = ()
    """Folds of cross-validation, from 1; empty where the splits are no fold."""
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Splits in shards by role: ``train``, ``val``, ``test``; of several folds all that took the role."""
    deviation: float | None = None
    """Standard deviation of ``value`` over ``runs`` (n - 1 in the denominator); None for a single run."""
    runs: tuple[RunScore, ...] = ()
    """The runs that ``value`` is the mean of; empty for a single one."""
    target: str = ""
    """What was predicted, by its name in the shards."""
    encoder: str = ""
    """What was evaluated, as it was named: a run, a checkpoint, an exported model or a baseline."""
    trained_on: tuple[str, ...] = ()
    """Datasets the encoder was pretrained on; empty for one that was not."""
    fraction: float = 1.0
    """Share of the training labels that were used."""
    checkpoint_step: int | None = None
    """Optimizer steps the encoder was trained for; None where that is unknown, 0 for an untrained one."""
    recipe: Mapping[str, Any] | None = None
    """The resolved recipe, as plain values."""
    chosen: Mapping[str, float] = field(default_factory=dict)
    """Hyperparameters chosen on validation; empty for several runs."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds spent, by part."""
    version: int = VERSION
    """Version of this layout."""
    maps: Mapping[str, np.ndarray] | None = field(default=None, compare=False, repr=False)
    """``truth`` and ``answer`` of a few tiles, (n, H, W) uint8; in ``maps.npz`` beside the JSON, not read back."""

    def write(self, path: Path) -> None:
        """Write as JSON: a reader sees the old file or the new one. ValueError if a number is not finite."""
        for name, value in self._numbers().items():
            if not math.isfinite(value):
                raise ValueError(f"{self.benchmark} {self.mode}: {name} is {value}; undefined must be None")
        values = dataclasses.asdict(dataclasses.replace(self, maps=None))
        values.pop("maps")
        (path.parent / MAPS).unlink(missing_ok=True)
        if self.maps is not None:
            packed = io.BytesIO()
            np.savez_compressed(packed, **self.maps)
            write_atomically(path.parent / MAPS, packed.getvalue())
        write_atomically(path, json.dumps(values, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> EvalResult:
        """Read what ``write`` wrote. ResultsError if the file is missing, malformed or of another version."""
        try:
            values = json.loads(path.read_text(), parse_constant=_refuse)
        except (OSError, ValueError) as error:
            raise ResultsError(f"{path} cannot be read ({error}); evaluate again to write it") from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise ResultsError(
                f"{path} has layout version {version!r}, this maestro-scale reads {VERSION}: "
                "evaluate again, or read it with the maestro-scale that wrote it"
            )
        known = {f.name for f in dataclasses.fields(cls)} - {"maps"}
        required = {f.name for f in dataclasses.fields(cls) if _is_required(f)}
        wrong = sorted((set(values) - known) | (required - set(values)))
        if wrong:
            raise ResultsError(
                f"{path} lacks or does not know the fields: {', '.join(wrong)}; evaluate again"
            )
        matrix = values.get("confusion")
        try:
            result = cls(
                **{
                    **values,
                    "interval": tuple(values["interval"]),
                    "seeds": tuple(values.get("seeds", (0,))),
                    "folds": tuple(values.get("folds", ())),
                    "splits": {role: tuple(names) for role, names in values.get("splits", {}).items()},
                    "runs": tuple(
                        RunScore(**{**run, "interval": tuple(run["interval"])})
                        for run in values.get("runs", ())
                    ),
                    "trained_on": tuple(values.get("trained_on", ())),
                    "confusion": None if matrix is None else tuple(tuple(row) for row in matrix),
                }
            )
            problem = next(result._problems(), None)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ResultsError(f"{path} is malformed ({error}); evaluate again") from error
        if problem is not None:
            raise ResultsError(f"{path} is malformed: {problem}; evaluate again")
        return result

    def _problems(self) -> Iterator[str]:
        """What cannot be in a result, in words."""
        if self.metric not in METRICS:
            yield f"metric {self.metric!r} is none of {', '.join(METRICS)}"
        if len(self.interval) != 2:
            yield f"an interval of {len(self.interval)} numbers"
        for name, value in self._numbers().items():
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                yield f"{name} is {value!r}, no fraction of 1"
        if not self.seeds:
            yield "no seed"
        num_classes = len(self.per_class)
        if self.confusion is not None and {len(self.confusion), *map(len, self.confusion)} != {num_classes}:
            yield f"a confusion of {len(self.confusion)} rows for {num_classes} classes"

    def _numbers(self) -> dict[str, float]:
        named = {"value": self.value, "interval low": self.interval[0], "interval high": self.interval[1]}
        scores = {f"per-class score of {k}": v for k, v in self.per_class.items() if v is not None}
        return named | scores | {f"score {k}": v for k, v in self.scores.items()}


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which is no number")


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
