"""The dry run of a recipe, without data or GPU: parameters, tokens, FLOPs, memory, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from maestro_scale import datasets
from maestro_scale.datasets.description.load import shipped_spec
from maestro_scale.datasets.sensor_sets import without
from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.escaping import console_text
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import GIB, Cost, compute_cost, sensor_parameters
from maestro_scale.recipe import (
    MixtureEntry,
    Recipe,
    RecipeError,
    build_model_config,
    check_world,
    resolve_spec,
)
from maestro_scale.shards.errors import ShardsError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.storage import local_folder
from maestro_scale.stream.sensor_sets import absent_sensors
from maestro_scale.training.deepspeed_check import check_deepspeed
from maestro_scale.training.memory import MemoryEstimator
from maestro_scale.training.stored_data import StoredData, division_of, source_of, stored_data


def dry_run(recipe: Recipe, world_size: int, console: Console | None = None) -> None:
    """Print the plan of a run. RecipeError where the recipe cannot run on ``world_size`` ranks."""
    console = console or Console(width=110)
    check_world(recipe, world_size)
    check_deepspeed(recipe.deepspeed_config(1, "cuda"))
    specs = [
        resolve_spec(_stored_spec(entry), entry, i, recipe.model.spectral)
        for i, entry in enumerate(recipe.data.mixture)
    ]
    config = build_model_config(recipe, specs)
    estimator = MemoryEstimator(config, specs)
    by_dataset = {
        v.dataset: compute_cost(config.for_dataset(v.dataset), recipe.masking.ratio) for v in config.views
    }
    titles = " and ".join(dict.fromkeys(s.title for s in specs))
    console.print(console_text(f"{recipe.name}: MAESTRO {recipe.model.size} on {titles}"))
    console.print(f"parameters        {estimator.parameters:,}")
    for view, entry in zip(config.views, recipe.data.mixture, strict=True):
        counted = by_dataset[view.dataset]
        console.print(_tokens(config.for_dataset(view.dataset), counted))
        console.print(
            f"FLOPs per sample  {counted.forward_flops / 1e9:.1f} GFLOP forward, "
            f"{counted.step_flops / 1e9:.1f} GFLOP with backward"
            + (f"; weight {entry.weight:g} in the mixture" if config.others else "")
        )
    for table in _sensor_sets(recipe, specs, [v.dataset for v in config.views]):
        console.print(table)
    console.print(_memory(recipe, estimator, world_size))
    weights = [e.weight for e in recipe.data.mixture]
    flops = sum(c.step_flops * w for c, w in zip(by_dataset.values(), weights, strict=True)) / sum(weights)
    console.print(_steps(recipe, flops))


def specs_and_sizes(recipe: Recipe) -> tuple[list[DatasetSpec], list[StoredData | None]]:
    """Of each dataset the resolved spec, and what its splits hold; None where its shards cannot be read.

    SampleOrderError where a set of tiles is too small for a step.
    """
    specs: list[DatasetSpec] = []
    sizes: list[StoredData | None] = []
    for i, entry in enumerate(recipe.data.mixture):
        try:
            manifest = Manifest.load(entry.shards)
        except ShardsError:
            manifest = None
        stored = _stored_spec(entry) if manifest is None else manifest.spec
        spec = resolve_spec(stored, entry, i, recipe.model.spectral)
        specs.append(spec)
        sizes.append(
            None if manifest is None else stored_data(manifest, entry, spec, recipe.train.global_batch)
        )
    return specs, sizes


def _stored_spec(entry: MixtureEntry) -> DatasetSpec:
    if entry.dataset in datasets.known():
        return datasets.spec(entry.dataset)
    try:
        return Manifest.load(entry.shards).spec
    except ShardsError:
        if (spec := shipped_spec(entry.dataset)) is not None:
            return spec
        raise  # a user's own dataset is described by its manifest alone


def _tokens(view: ModelConfig, counted: Cost) -> Table:
    """``view``: the model for one dataset."""
    table = Table(title=f"Tokens per sample, {view.dataset}", title_justify="left")
    for column in ("sensor", "group", "dates", "pixels", "patch", "bands", "tokens", "parameters"):
        table.add_column(column, justify="left" if column in ("sensor", "group") else "right")
    parameters = sensor_parameters(view)
    for s in view.sensors:
        bands = "+".join(map(str, view.token_groups(s)))  # of each token of a patch
        numbers = (
            s.num_dates,
            s.image_size,
            s.patch,
            bands,
            counted.tokens[s.name],
            f"{parameters[s.name]:,}",
        )
        table.add_row(s.name, console_text(s.group), *map(str, numbers))
    table.add_section()
    table.add_row("all", "", "", "", "", "", f"{sum(counted.tokens.values())}")
    table.add_row("visible to the encoder", "", "", "", "", "", f"{counted.visible_tokens}")
    table.caption = (
        "parameters: of embedding, mask tokens and projection to pixels; the others are of no single sensor"
    )
    table.caption_justify = "left"
    return table


def _sensor_sets(recipe: Recipe, specs: Sequence[DatasetSpec], names: Sequence[str]) -> Iterator[Table]:
    """A table for each dataset of which some tiles lack sensors. Only of manifests that are read in no time: a dry run
    needs no data. SampleOrderError where a set of tiles is too small for a step."""
    for entry, spec, name in zip(recipe.data.mixture, specs, names, strict=True):
        if local_folder(entry.shards) is None and entry.dataset in datasets.known():
            continue
        try:
            manifest = Manifest.load(entry.shards)
        except ShardsError:
            continue
        shards = source_of(manifest, entry, spec).shards
        if not any(absent_sensors(spec, shard) for shard in shards):
            continue
        division = division_of(manifest, entry, spec, recipe.train.global_batch)
        table = Table(title=f"Steps by sensors of the tiles, {name}", title_justify="left", min_width=70)
        table.add_column("tiles")
        for column in ("number", "steps per epoch"):
            table.add_column(column, justify="right")
        for part in division.sources:
            count = int(part.counts.sum())
            steps = max(count // recipe.train.global_batch, 1)
            table.add_row(console_text(without(name, part.absent)), f"{count:,}", f"{steps:,}")
        table.caption = "; ".join((*division.lines, "~: without"))
        table.caption_justify = "left"
        yield table


def _memory(recipe: Recipe, estimator: MemoryEstimator, world_size: int) -> Table:
    t, worlds = recipe.train, [n for n in sorted({world_size, 8, 64}) if _holds(recipe, n)]
    micro_batch = 1 if t.micro_batch == "auto" else t.micro_batch
    table = Table(
        title=f"GiB per rank by ZeRO stage on GPUs, AdamW, {t.precision_on('cuda')}, micro-batch {micro_batch}",
        title_justify="left",
        min_width=70,
    )
    for column in ("stage", *(f"{n} rank{'s' * (n > 1)}" for n in worlds)):
        table.add_column(column, justify="right")
    for stage in range(4):
        variant = recipe.with_zero_stage(stage).with_micro_batch(micro_batch)
        row = [f"{estimator.step(variant, n, 'cuda').device / GIB:.2f}" for n in worlds]
        table.add_row(f"{stage}{' (recipe)' if stage == recipe.zero_stage else ''}", *row)
    memory = estimator.step(recipe.with_micro_batch(micro_batch), world_size, "cuda")
    table.caption = (
        f"of these on {world_size} rank{'s' * (world_size > 1)}: {memory.activations / GIB:.2f} GiB activations, "
        f"{memory.batches / GIB:.2f} GiB batches"
    )
    if t.micro_batch == "auto":
        table.caption += "; train.micro_batch auto: chosen at the start; maestro-scale plan lists the choices"
    table.caption_justify = "left"
    return table


def _holds(recipe: Recipe, world_size: int) -> bool:
    try:
        check_world(recipe, world_size)
    except RecipeError:
        return False
    return True


def _steps(recipe: Recipe, flops_per_sample: float) -> str:
    t = recipe.train
    length = f"{t.steps:,} steps" if t.steps is not None else f"{t.epochs} epochs"
    flops = flops_per_sample * t.global_batch
    return (
        f"length            {length} of {t.global_batch} samples ({flops / 1e12:.2f} TFLOP a step), "
        f"peak learning rate {recipe.lr:.3g}"
    )
