"""The encoder that is evaluated, as named on the command line: a checkpoint, one checkpoint per fold, or a baseline."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from maestro_scale.evaluation.baselines.baseline import Baseline, FrozenEncoder, TrainableBaseline
from maestro_scale.evaluation.baselines.content import content_digest
from maestro_scale.evaluation.baselines.registry import build_baseline
from maestro_scale.evaluation.features.adapt import adapt_encoder
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.evaluation.features.load_encoder import load_encoder
from maestro_scale.evaluation.finetune.predictor import TRAINABLE
from maestro_scale.evaluation.results import ORACLE, Architecture, EvaluationError
from maestro_scale.interop.sources import is_local
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe, resolve_spec
from maestro_scale.secrets_filter import scrub
from maestro_scale.shards.format.manifest import Manifest

FOLD = "{fold}"
"""In the path of a checkpoint: replaced by the number of the fold."""


class Encoder:
    """An encoder with what results record of it.

    ``name``: as in results; ``path``: of the checkpoint, None for a baseline; ``step``: optimizer steps it was trained
    for; ``trained_on``: datasets; ``weights``, ``adaptation`` and ``architecture``: as in ``EvalResult``; ``spec``: of
    the benchmark, resolved, and ``manifest`` its manifest; ``per_fold``: another checkpoint for each fold.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: str | None,
        baseline: str | None,
        fold: int | None,
        manifest: Manifest | None = None,
    ) -> None:
        """Load ``checkpoint`` (with ``{fold}`` replaced) or build ``baseline``. EvaluationError, ExportError or
        CheckpointError where that is impossible."""
        entry = recipe.data.mixture[0]
        self.manifest = manifest or Manifest.load(entry.shards)
        # Only the model of a baseline follows from the recipe. That of a checkpoint has token groups of its own, which
        # adapt_encoder gives to the sensors.
        spectral = "joint" if baseline is None else recipe.model.spectral
        self.spec = resolve_spec(self.manifest.spec, entry, spectral=spectral)
        self._recipe, self._checkpoint, self._baseline, self._fold = recipe, checkpoint, baseline, fold
        self.name = scrub(baseline or str(checkpoint))
        self.per_fold = checkpoint is not None and FOLD in checkpoint
        self.path: Path | None = None
        self.step: int | None = 0
        self.trained_on: tuple[str, ...] = ()
        self.weights = ""
        self.adaptation = ""
        self._model: FrozenEncoder | None = None
        if baseline == ORACLE:
            return  # the oracle reads pixels: it has no encoder
        if baseline is not None:
            self._model = build_baseline(baseline, recipe, self.spec)
            if isinstance(self._model, Baseline):
                self.adaptation = self._model.adaptation
                self.weights = content_digest(baseline)
            return
        if self.per_fold and fold is None:
            raise EvaluationError(f"--checkpoint {checkpoint}: {FOLD} needs --folds")
        self.path = self._path(fold)
        model, self.step = load_encoder(self.path)
        self._model = model
        if not self.per_fold:  # else the runs of one mean would differ
            self.weights = weights_digest(model)
        if self.step != 0:
            self.trained_on = tuple(v.dataset for v in model.config.views)

    def for_fold(self, fold: int | None) -> Encoder:
        """The encoder of a fold: itself, unless every fold has its own checkpoint."""
        if not self.per_fold or fold == self._fold:
            return self
        return Encoder(self._recipe, self._checkpoint, self._baseline, fold, self.manifest)

    def check(self, folds: Sequence[int | None], trained_modes: Collection[str]) -> None:
        """EvaluationError where the checkpoint of a fold is missing, or the encoder cannot be trained in one of
        ``trained_modes``. To be called before the first run, which may take hours."""
        if trained_modes and self._baseline is not None and not isinstance(self._model, TRAINABLE):
            raise EvaluationError(
                f"--baseline {self._baseline} is not trained here: use --mode knn, probe or attentive"
            )
        if isinstance(self._model, TrainableBaseline):
            self._model.check_trainable(trained_modes)
        missing = [p for fold in folds if self.path and is_local(p := self._path(fold)) and not p.exists()]
        if missing:
            raise EvaluationError(f"--checkpoint: there is no {' and no '.join(map(str, missing))}")

    def check_finetuned(self) -> None:
        """EvaluationError unless it is a finetuned model."""
        if not isinstance(self._model, Maestro) or self._model.finetuned is None:
            raise EvaluationError(
                f"--mode test predicts with a finetuned model, which {self.name} is not: give the directory of a "
                "finetuning (OUT/finetune) or its export"
            )

    @property
    def architecture(self) -> Architecture | None:
        """Of a MAESTRO, pretrained or not; None of another encoder."""
        if not isinstance(self._model, Maestro):
            return None
        config = self._model.config
        size = config.size
        return Architecture(
            size.width,
            size.depth,
            size.heads,
            size.dim_head,
            size.mlp_ratio,
            config.fusion,
            config.inter_depth,
            config.spectral,
            config.norm,
        )

    @property
    def finetuned(self) -> Maestro:
        """The finetuned model; see ``check_finetuned``."""
        assert isinstance(self._model, Maestro)
        return self._model

    def for_benchmark(self, trains: bool) -> tuple[FrozenEncoder, list[str]]:
        """(the encoder, adapted to the benchmark, notes for the user). ``trains``: it will be trained, so sensors
        without pretrained weights stay."""
        assert self._model is not None  # only the oracle has none
        if isinstance(self._model, Maestro) and self._baseline is None:
            return adapt_encoder(self._model, self.spec, trains)
        return self._model, []  # a baseline is built for the benchmark

    def _path(self, fold: int | None) -> Path:
        return Path(str(self._checkpoint).replace(FOLD, str(fold)))
