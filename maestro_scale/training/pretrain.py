"""Pretraining: the datasets, the model, the objective and the hooks of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from maestro_scale.interop.partial import start_from
from maestro_scale.interop.transfer import transfer_table
from maestro_scale.model import attention
from maestro_scale.model.compiled import copy_first_gradients
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe, RecipeError, build_masking, build_model_config, resolve_spec
from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.secrets_filter import scrub_document
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.sensor_sets import complete
from maestro_scale.stream.source import Source, mixture_names
from maestro_scale.training.assembly import (
    RunContext,
    TrainingParts,
    assemble,
    check_disk,
    check_feasible,
    run_directory,
    seed_everything,
)
from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.checkpoint.identity import precision_identity, with_recorded_draws
from maestro_scale.training.checkpoint.mirror import Mirror
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.data import train_loader
from maestro_scale.training.determinism import configure_determinism
from maestro_scale.training.distributed import World
from maestro_scale.training.ema import WeightEMA
from maestro_scale.training.engine import Engine
from maestro_scale.training.hooks.hook import Hook
from maestro_scale.training.hooks.pictures import PicturesHook
from maestro_scale.training.manifests import UsedDataset, compare_manifests, load_manifests, manifest_digests
from maestro_scale.training.memory import MemoryEstimator
from maestro_scale.training.micro_batch import micro_batch_of
from maestro_scale.training.objectives import PretrainObjective
from maestro_scale.training.observer import Observer
from maestro_scale.training.run_dir import RunDirError, manifest_path, write_atomically
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.trainer import Outcome
from maestro_scale.training.watchdog import Watchdog

log = logging.getLogger(__name__)


EvaluationHooks = Callable[
    [Recipe, World, Maestro, Watchdog, Sequence[UsedDataset]], Callable[[Engine], Sequence[Hook]]
]
"""From (recipe, world, model, watchdog, datasets of the mixture) to a function from the engine to hooks.

The evaluation is a layer above, so it is passed in. In two calls, because the first needs the model before DeepSpeed
partitions it, the second the engine.
"""


def no_evaluation(
    recipe: Recipe, world: World, model: Maestro, watchdog: Watchdog, datasets: Sequence[UsedDataset]
) -> Callable[[Engine], Sequence[Hook]]:
    """No in-loop evaluation."""
    return lambda engine: ()


@dataclass(frozen=True)
class Dataset:
    """One entry of the mixture: its manifest, and its source with the spec of the run."""

    manifest: Manifest
    source: Source


def pretrain(
    recipe: Recipe,
    run_dir: Path,
    world: World,
    observers: Sequence[Observer],
    watchdog: Watchdog,
    stop: StopRequest,
    fresh: bool = False,
    evaluation: EvaluationHooks = no_evaluation,
) -> Outcome:
    """Train, or resume, the run in ``run_dir``; every rank calls it with the same arguments.

    ``evaluation``: hooks that score the encoder while it trains. Raises MaestroError with one clear line.
    """
    with run_directory(recipe, run_dir, world):
        if fresh:
            _refuse_unless_new(recipe, run_dir, world)
        world.barrier()
        context = RunContext(recipe, run_dir, world, observers, watchdog, stop)
        trainer, position = assemble(context, _parts(context, evaluation))
        return trainer.run(position)


def open_datasets(recipe: Recipe, world: World | None = None) -> list[Dataset]:
    """Read every manifest of the mixture, once per node, and resolve its spec; a collective of ``world``. RecipeError
    where the recipe does not fit it; ManifestError."""
    mixture = recipe.data.mixture
    manifests = load_manifests([entry.shards for entry in mixture], Path(recipe.data.cache_dir), world)
    datasets = []
    for i, (entry, manifest) in enumerate(zip(mixture, manifests, strict=True)):
        store = Store(
            entry.shards,
            Path(recipe.data.cache_dir),
            int(recipe.data.cache_gib * 2**30),
            RetryPolicy.with_deadline(recipe.data.retry_s),
        )
        source = Source(
            spec=resolve_spec(manifest.spec, entry, i, recipe.model.spectral),
            shards=manifest.shards_of(entry.split),
            store=store,
            weight=entry.weight,
        )
        if entry.incomplete == "leave_out":
            source, left_out = complete(source)
            if left_out:
                log.info("%s: %d tiles that lack a sensor are left out", manifest.spec.name, left_out)
        datasets.append(Dataset(manifest, source))
    return datasets


def identity(recipe: Recipe, config: ModelConfig, datasets: list[Dataset], world: World) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption; ``model`` is enough to rebuild the model."""
    model = {k: v for k, v in config.to_dict().items() if k not in ModelConfig.RUNTIME_FIELDS}
    data = {
        "order": {
            "lanes": recipe.data.lanes,
            "shuffle_window": recipe.data.shuffle_window,
            "flips": recipe.data.flips,
            "first_date": recipe.first_date,
        },
        "manifests": _digests_in_use(recipe, datasets, world),
        "splits": [list(e.split) for e in recipe.data.mixture],
        "weights": [e.weight for e in recipe.data.mixture],
        "crops_m": [d.source.spec.crop_m for d in datasets],
    }
    if any(e.incomplete != "use" for e in recipe.data.mixture):  # absent from identities of earlier revisions
        data["incomplete"] = [e.incomplete for e in recipe.data.mixture]
    optim = recipe.optim.model_dump(mode="json")
    masking = {**recipe.masking.model_dump(), "structure": recipe.has_structural_masks}
    train_section = {"global_batch": recipe.train.global_batch, "masking": masking}
    # Neither the ZeRO stage nor the number of ranks: the state on disk does not depend on them.
    engine = precision_identity(recipe.train.precision_on(world.device.type))
    return {
        "seed": recipe.seed,
        "model": model,
        "data": data,
        "optim": optim,
        "train": train_section,
        "engine": engine,
    }


def _digests_in_use(recipe: Recipe, datasets: Sequence[Dataset], world: World) -> list[str]:
    """Of the splits in use: adding another split to a dataset does not change a run. Computed by rank 0, as a manifest
    of 100,000 shards takes seconds; all ranks have the same manifests (``compare_manifests``)."""
    in_use = zip(datasets, recipe.data.mixture, strict=True)
    return world.from_main([d.manifest.digest_of(e.split) for d, e in in_use] if world.is_main else [])


def _refuse_unless_new(recipe: Recipe, run_dir: Path, world: World) -> None:
    # A lock file, a STOP file and files of observers can exist before the first start.
    if any((run_dir / name).exists() for name in ("metrics.jsonl", "recipe.yaml", "checkpoints")):
        raise RunDirError(
            f"--fresh starts over only in an empty directory, and {run_dir} contains a run: use another"
        )
    mirror = _mirror(recipe, run_dir) if world.is_main else None
    if mirror is not None and (names := mirror.names()):
        raise RunDirError(
            f"--fresh starts over, and {mirror.url} contains {names[0]} of a run of this name: use another --run-dir "
            "or checkpoint.mirror"
        )


def _retention(recipe: Recipe) -> Retention:
    return Retention(recipe.checkpoint.keep, recipe.checkpoint.keep_every)


def _mirror(recipe: Recipe, run_dir: Path) -> Mirror | None:
    url = recipe.checkpoint.mirror
    return Mirror(f"{url.rstrip('/')}/{run_dir.resolve().name}", _retention(recipe)) if url else None


def _parts(context: RunContext, evaluation: EvaluationHooks) -> TrainingParts:
    recipe, run_dir, world = context.recipe, context.run_dir, context.world
    seed_everything(recipe.seed)
    configure_determinism(recipe.train.deterministic)
    datasets = open_datasets(recipe, world)
    for dataset in datasets:
        dataset.source.store.prepare()
    used = used_datasets(recipe, datasets)
    compare_manifests(world, used)
    checkpoints = Checkpoints(
        run_dir, world, _retention(recipe), _mirror(recipe, run_dir), manifest_digests(used)
    )
    recorded = checkpoints.recorded_identity()
    recipe = with_recorded_draws(recipe, recorded, world)
    config = build_model_config(recipe, [d.source.spec for d in datasets])
    own = identity(recipe, config, datasets, world)
    if recorded is not None:  # before anything is allocated; `resume` checks the checkpoint that it loads
        checkpoints.check_identity(recorded, own)
    memory = MemoryEstimator(config, [d.source.spec for d in datasets])
    micro_batch = micro_batch_of(
        recipe, world, lambda changed: memory.step(changed, world.size, world.device.type)
    )
    stream, num_steps = train_loader(recipe, [d.source for d in datasets], world, micro_batch)
    check_feasible(recipe.with_micro_batch(micro_batch), memory.parameters, recipe.optim.ema > 0, world)
    if world.is_main:
        check_disk(run_dir, memory.parameters, recipe.optim.ema > 0)
    kernel = _attention_kernel(recipe, config, world)
    model = _initial_model(recipe, config, world, starts=recorded is None)
    _compile(model, recipe.with_micro_batch(micro_batch), world)
    objective = PretrainObjective(
        configs={name: config.for_dataset(name) for name in stream.sources},
        sources=stream.sources,
        masking=build_masking(recipe),
    )
    if world.is_main:
        for number, dataset in enumerate(datasets):
            path = manifest_path(run_dir, number, dataset.manifest.spec.name)
            write_atomically(path, scrub_document(dataset.manifest.dumps()))

    evaluation_hooks = evaluation(recipe, world, model, context.watchdog, used)

    def build_hooks(engine: Engine, ema: WeightEMA | None) -> list[Hook]:
        hooks = list(evaluation_hooks(engine))
        if every := recipe.tracking.pictures_every:
            observers = context.observers if world.is_main else []
            hooks.append(PicturesHook(model, _band_names(config, datasets), observers, every))
        return hooks

    return TrainingParts(
        network=model,
        objective=objective,
        stream=stream,
        num_steps=num_steps,
        micro_batch=micro_batch,
        checkpoints=checkpoints,
        identity=own,
        build_hooks=build_hooks,
        spike=recipe.train.spike,
        ema_decay=recipe.optim.ema or None,
        ema_epochs=recipe.optim.ema_epochs,
        compile_mode=recipe.model.compile,
        datasets=used,
        about={"attention": kernel},
    )


def used_datasets(recipe: Recipe, datasets: Sequence[Dataset]) -> list[UsedDataset]:
    """The datasets of the mixture with unique names, and the splits that the run reads."""
    names = mixture_names([d.manifest.spec.name for d in datasets])
    return [
        UsedDataset(name, entry.shards, d.manifest, tuple(entry.split))
        for name, d, entry in zip(names, datasets, recipe.data.mixture, strict=True)
    ]


def _initial_model(recipe: Recipe, config: ModelConfig, world: World, starts: bool) -> Maestro:
    """The model before its first step. ``starts``: no checkpoint will be loaded, so ``model.init_from`` applies."""
    model = Maestro(config).initialise(recipe.seed)
    if recipe.model.init_from is not None and starts:
        parts = start_from(model, recipe.model.init_from)
        if world.is_main:
            Console(width=110).print(
                transfer_table(parts, f"{recipe.name} starts from {recipe.model.init_from}")
            )
    return model


def _compile(model: Maestro, recipe: Recipe, world: World) -> None:
    """Compile the model at its first step, as ``model.compile`` says."""
    # torch calls the device of AMD GPUs cuda too; no other has graphs.
    cuda_graphs = recipe.model.compile == "step" and world.device.type == "cuda"
    model.compile_training(recipe.model.compile, cuda_graphs)
    if cuda_graphs and recipe.zero_stage < 2 and recipe.num_micro_batches(world.size) > 1:
        copy_first_gradients(model)


def _attention_kernel(recipe: Recipe, config: ModelConfig, world: World) -> str:
    fp32 = recipe.train.precision_on(world.device.type) == "fp32"
    dtype = torch.float32 if fp32 else torch.bfloat16  # of q, k and v: also under autocast
    size = config.size
    try:
        kernels = [
            attention.resolve_backend(config.attention, world.device, dtype, dim)
            for dim in dict.fromkeys((size.dim_head, size.decoder_dim_head))
        ]
    except ValueError as error:
        raise RecipeError(str(error)) from None
    kernel = ", ".join(dict.fromkeys(kernels))
    if world.is_main:
        log.info("attention: %s (%s) on %s", kernel, config.attention, world.device.type)
    return kernel


def _band_names(config: ModelConfig, datasets: Sequence[Dataset]) -> dict[str, dict[str, tuple[str, ...]]]:
    """{dataset: {sensor: names of its bands}}."""
    names = {}
    for view, dataset in zip(config.views, datasets, strict=True):
        spec = dataset.manifest.spec
        names[view.dataset] = {
            s.name: tuple(spec.modality(s.source).bands[b] for b in s.bands) for s in view.sensors
        }
    return names
