"""Builds the trainer of a finetuning: data, network, objective, hooks and identity."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from maestro_scale import untrusted
from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.baselines.baseline import TrainableBaseline
from maestro_scale.evaluation.benchmark import Benchmark
from maestro_scale.evaluation.features.adapt import encoder_spec
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.evaluation.features.missing import check_can_encode
from maestro_scale.evaluation.finetune.early_stop import ValidationScore
from maestro_scale.evaluation.finetune.objective import FinetuneObjective
from maestro_scale.evaluation.finetune.predictor import MaestroPredictor, build_predictor
from maestro_scale.evaluation.finetune.validation import ValidationHook, ValidationSettings
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.evaluation.tasks.losses import TargetLoss, needs_label_counts, target_loss_for
from maestro_scale.evaluation.tasks.subset import labelled_subset, read_label_counts
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.interop.export import FinetunedRun
from maestro_scale.interop.tensors import file_sha256
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe, RecipeError
from maestro_scale.shards.progress import Progress
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.sensor_sets import complete
from maestro_scale.stream.source import Source
from maestro_scale.training.assembly import RunContext, TrainingParts, assemble, check_feasible
from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.checkpoint.identity import precision_identity, with_recorded_draws
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.data import train_loader
from maestro_scale.training.determinism import configure_determinism
from maestro_scale.training.distributed import World
from maestro_scale.training.ema import WeightEMA
from maestro_scale.training.engine import Engine
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.manifests import UsedDataset, manifest_digests
from maestro_scale.training.memory import MemoryEstimator, StepMemory
from maestro_scale.training.micro_batch import micro_batch_of
from maestro_scale.training.run_dir import JsonLines
from maestro_scale.training.trainer import Trainer

log = logging.getLogger(__name__)


class Finetuning:
    """The data, the network and the trainer of one finetuning; ``validation`` exists once it is assembled."""

    validation: ValidationHook

    def __init__(
        self,
        encoder: Maestro | TrainableBaseline,
        benchmark: Benchmark,
        mode: str,
        checkpoint: Path | None,
        recipe: Recipe,
        world: World,
    ) -> None:
        self._about = {"mode": mode, "checkpoint": str(checkpoint.resolve()) if checkpoint else None}
        self._encoder, self._benchmark, self._mode = encoder, benchmark, mode
        self._recipe, self._world = recipe, world
        self.manifest = benchmark.load_manifest()
        self._spec = encoder_spec(encoder, benchmark.spec)
        task = task_for(self._spec, benchmark.target, benchmark.loss)
        self.splits = self._open_splits(task.target)
        counts = None
        if needs_label_counts(task):
            counts = read_label_counts(self.splits["train"], task, world)
        self.target_loss: TargetLoss = target_loss_for(task, counts)

    def assemble(self, context: RunContext, report: Progress) -> tuple[Trainer, Position]:
        """The trainer and its position; ``report`` is called after every step."""
        recipe, world = self._recipe, self._world
        configure_determinism(recipe.train.deterministic)
        network, averaged = self._network(), self._network()
        micro_batch = self._micro_batch(network.config)
        checkpoints = Checkpoints(
            context.run_dir, world, Retention(keep=1), datasets=manifest_digests(self._datasets)
        )
        recipe = self._recipe = with_recorded_draws(recipe, checkpoints.recorded_identity(), world)
        stream, num_steps = train_loader(recipe, [self.splits["train"]], world, micro_batch)
        num_parameters = sum(p.numel() for p in network.parameters())
        check_feasible(recipe.with_micro_batch(micro_batch), num_parameters, True, world)
        averaged.to(world.device).requires_grad_(False).eval()

        def build_hooks(engine: Engine, ema: WeightEMA | None) -> list[Hook]:
            assert ema is not None
            self.validation = ValidationHook(
                averaged,
                ema,
                self.splits["val"],
                world,
                context.run_dir,
                ValidationSettings(
                    recipe.evaluation.validations,
                    recipe.evaluation.patience,
                    recipe.data.workers,
                    recipe.train.precision,
                ),
                lambda step: context.watchdog.note(step, "evaluating"),
            )
            return [_ProgressHook(report, num_steps), self.validation]

        parts = TrainingParts(
            network=network,
            objective=FinetuneObjective(self.target_loss, self.splits["train"]),
            stream=stream,
            num_steps=num_steps,
            micro_batch=micro_batch,
            checkpoints=checkpoints,
            identity=self._identity(weights_digest(network), num_steps),
            build_hooks=build_hooks,
            ema_decay=recipe.evaluation.ema,
            # An average of all steps would hold the initial weights for long; one of epochs follows the reference.
            ema_warmup=recipe.evaluation.ema_epochs == 0,
            ema_epochs=recipe.evaluation.ema_epochs,
            spike=recipe.evaluation.spike,
            # Weights that were not pretrained have nothing to preserve.
            layer_decay=recipe.evaluation.layer_decay if self._mode == "finetune" else 1.0,
            datasets=self._datasets,
            about=self._about,
        )
        trainer, position = assemble(context, parts)
        self._load_earlier_revision(context.run_dir, trainer, position)
        return trainer, position

    def record(self, network: MaestroPredictor, result: EvalResult) -> FinetunedRun:
        """What an export of this run contains, once it was tested. ``network``: with the best weights."""
        best, config = self.validation.best_weights, network.config
        assert isinstance(config, ModelConfig)
        finetuned = Finetuned(
            spec=self._spec,
            target=result.target,
            metric=result.metric,
            mode=self._mode,
            step=self.validation.best.step,
            validation=self.validation.best.score,
            test=result.value,
            trained_on=result.trained_on,
            overlap=self._recipe.evaluation.overlap,
        )
        trained = {
            "checkpoint": best.stem,
            "step": self.validation.best.step,
            "seed": self._recipe.seed,
            "datasets": dict(result.datasets),
        }
        name = best.relative_to(best.parents[1]).as_posix()
        return FinetunedRun(name, file_sha256(best), config, finetuned, trained)

    @property
    def _datasets(self) -> list[UsedDataset]:
        roles = self._benchmark.splits_by_role(self.manifest).values()
        splits = tuple(dict.fromkeys(name for names in roles for name in names))
        return [UsedDataset(self.manifest.spec.name, self._benchmark.shards, self.manifest, splits)]

    def _micro_batch(self, config: object) -> int:
        """``train.micro_batch``. For auto, the estimate is that of a pretraining without masks, whose decoder needs
        more memory than the head."""
        recipe = self._recipe
        if recipe.train.micro_batch == "auto" and not isinstance(config, ModelConfig):
            raise RecipeError(
                "train.micro_batch: auto is not known for this encoder: give a number of samples, for example "
                "--set train.micro_batch=8"
            )
        masking = recipe.masking.model_copy(update={"ratio": 0.0})
        optim = recipe.optim.model_copy(update={"ema": recipe.evaluation.ema})
        unmasked = recipe.model_copy(update={"masking": masking, "optim": optim})

        def estimate(with_number: Recipe) -> StepMemory:
            assert isinstance(config, ModelConfig)
            memory = MemoryEstimator(config, [self._spec])
            return memory.step(with_number, self._world.size, self._world.device.type)

        return micro_batch_of(unmasked, self._world, estimate)

    def _open_splits(self, target: Target) -> dict[str, Source]:
        benchmark = self._benchmark
        recipe, world = self._recipe, self._world
        store = Store(benchmark.shards, benchmark.cache_dir, benchmark.cache_bytes)
        self._train_name, fraction = benchmark.train_split(self.manifest)
        splits = {
            role: Source(self._spec, self.manifest.shards_of(benchmark.stored_splits(name)), store)
            for role, name in (("train", self._train_name), ("val", "val"), ("test", "test"))
        }
        check_can_encode(self._encoder, splits.values())
        if fraction < 1:
            used = labelled_subset(splits["train"], target, fraction, recipe.seed, world)
            splits["train"] = splits["train"].select_samples(used)
        if not benchmark.trains_on_incomplete:
            splits["train"], left_out = complete(splits["train"])
            if left_out:
                name = self.manifest.spec.name
                log.info("%s: %d training tiles that lack a sensor are left out", name, left_out)
        return splits

    def _network(self) -> Any:
        return build_predictor(
            self._encoder,
            self.manifest.spec.name,
            self.target_loss,
            self._recipe.seed,
            self._mode == "finetune",
            self._recipe.model.decoder,
        )

    def _identity(self, weights: str, num_steps: int) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption."""
        recipe, benchmark = self._recipe, self._benchmark
        stored = (*benchmark.stored_splits(self._train_name), *benchmark.stored_splits("val"))
        return {
            "seed": recipe.seed,
            "weights": weights,
            "data": self.manifest.digest_of(stored),
            "fraction": benchmark.fraction,
            "target": self.target_loss.task.target.name,
            "crop_m": self._spec.crop_m,
            "optim": recipe.optim.model_dump(mode="json"),
            "global_batch": recipe.train.global_batch,
            "lanes": recipe.data.lanes,
            "flips": recipe.data.flips,
            "first_date": recipe.first_date,
            "num_steps": num_steps,
            "validations": recipe.evaluation.validations,
            "ema": recipe.evaluation.ema,
            "ema_epochs": recipe.evaluation.ema_epochs,
            "layer_decay": recipe.evaluation.layer_decay,
            **({} if recipe.model.decoder == "attentive" else {"decoder": recipe.model.decoder}),
            **({} if benchmark.trains_on_incomplete else {"incomplete": "leave_out"}),
            **benchmark.loss.identity(),
            **precision_identity(recipe.train.precision_on(self._world.device.type)),
        }

    def _load_earlier_revision(self, run_dir: Path, trainer: Trainer, position: Position) -> None:
        """Checkpoints of earlier revisions contain neither the average nor the scores, which are in separate files."""
        average = run_dir / "average" / f"step_{position.step:08d}.safetensors"
        if position.step and average.exists() and trainer.state.ema is not None:
            trainer.state.ema.load_complete(untrusted.load_tensors(average))
            lines = JsonLines(run_dir / "validation.jsonl").read()
            scores = (ValidationScore(**line) for line in lines)
            self.validation.history = [score for score in scores if score.step <= position.step]


class _ProgressHook(Hook):
    def __init__(self, report: Progress, num_steps: int) -> None:
        self._report, self._num_steps = report, num_steps

    def after_step(self, step: FinishedStep) -> bool:
        self._report(step.position.step, self._num_steps, 0)
        return False
