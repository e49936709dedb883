"""What is evaluated, as it was named on the command line: a checkpoint, one per fold, or a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maestro_scale.evaluation.features.adapt import adapt_encoder
from maestro_scale.evaluation.features.baselines import Baseline, build_baseline
from maestro_scale.evaluation.features.load_encoder import load_encoder
from maestro_scale.evaluation.finetune.predictor import TRAINABLE
from maestro_scale.evaluation.results import ORACLE, ResultsError
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe, resolve_spec
from maestro_scale.secrets_filter import scrub
from maestro_scale.shards.format.manifest import Manifest

FOLD = "{fold}"


class Encoder:
    """``named``: as results say it; ``path``: of the checkpoint, None for a baseline; ``step``: that it was trained
    for; ``trained_on``: datasets; ``spec``: of the benchmark, resolved."""

    def __init__(
        self, recipe: Recipe, checkpoint: str | None, baseline_name: str | None, fold: int | None
    ) -> None:
        """``checkpoint`` with ``{fold}`` in it is another one for every fold. ResultsError, ExportError …"""
        entry = recipe.data.mixture[0]
        self.spec = resolve_spec(Manifest.load(entry.shards).spec, entry)
        self._asked = recipe, checkpoint, baseline_name
        self._baseline = baseline_name
        self._fold = fold
        self.name = scrub(baseline_name or str(checkpoint))
        self.per_fold = checkpoint is not None and FOLD in checkpoint
        self.path: Path | None = None
        self.step: int | None = 0
        self.trained_on: tuple[str, ...] = ()
        if baseline_name == ORACLE:
            return  # it encodes nothing
        if baseline_name is not None:
            self._model: Maestro | Baseline = build_baseline(baseline_name, recipe, self.spec)
            return
        if self.per_fold and fold is None:
            raise ResultsError(f"--checkpoint {checkpoint}: {FOLD} needs --folds")
        self.path = self._path(fold)
        self._model, self.step = load_encoder(self.path)
        if self.step != 0:
            self.trained_on = tuple(v.dataset for v in self._model.config.views)

    def for_fold(self, fold: int | None) -> Encoder:
        """The encoder of a fold: this one, unless each has its own."""
        if not self.per_fold or fold == self._fold:
            return self
        return Encoder(*self._asked, fold)

    def check(self, folds: Sequence[int | None], trains: bool) -> None:
        """ResultsError, before anything is done, where a fold has no encoder, or one that is to learn cannot."""
        if trains and self._baseline is not None and not isinstance(self._model, TRAINABLE):
            raise ResultsError(
                f"--baseline {self._baseline} is not trained here: use --mode knn, probe or attentive"
            )
        missing = [p for fold in folds if self.path and not (p := self._path(fold)).exists()]
        if missing:
            raise ResultsError(f"--checkpoint: there is no {' and no '.join(map(str, missing))}")

    def _path(self, fold: int | None) -> Path:
        return Path(str(self._asked[1]).replace(FOLD, str(fold)))

    def for_benchmark(self, trains: bool) -> tuple[Maestro | Baseline, list[str]]:
        """(the encoder as it sees the benchmark, what to report); ``trains``: and is trained on it."""
        if self._baseline is not None:
            return self._model, []
        return adapt_encoder(self._model, self.spec, trains)
