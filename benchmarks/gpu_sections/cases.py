"""The recipes that are measured, and their small versions for a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.model.config import ModelConfig
from maestro_scale.recipe import Recipe, build_model_config, load_recipe, resolve_spec

RECIPES = Path(__file__).parents[2] / "recipes"
_TINY_MODEL = (
    "model={size: tiny, width: 32, depth: 2, heads: 2, dim_head: 16, inter_depth: 1, decoder_depth: 1, "
    "decoder_width: 32, decoder_heads: 2}"
)
# Few tokens per sample: large patches, few dates.
_TINY_SENSORS = {
    "treesatai_ts": "{aerial: {image_size: 60, patch: 20}, s2: {num_dates: 4, patch: 3}, "
    "s1_asc: {num_dates: 2, patch: 3}, s1_des: {num_dates: 2, patch: 3}}",
    "flair_hub": "",
}
# Large enough to learn in a few hundred steps, small enough for 200 of them in seconds on a GPU.
_SMALL_MODEL = (
    "model={size: tiny, width: 96, depth: 4, heads: 3, inter_depth: 1, decoder_depth: 1, decoder_width: 64}"
)


@dataclass(frozen=True)
class Case:
    """One rank's share of a step: a dataset, a model size and a micro-batch, which is the whole batch of the step."""

    dataset: str
    size: str
    micro_batch: int
    sets: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name in tables."""
        changes = " ".join(s.rpartition(".")[2] for s in self.sets)
        return f"{self.size} {self.dataset} {self.micro_batch} {changes}".strip()


SPEED_CASES = (
    Case("treesatai_ts", "base", 6),
    Case("treesatai_ts", "base", 128),
    Case("flair_hub", "base", 64),
    Case("flair_hub", "large", 32),
)
MEMORY_CASES = (
    Case("treesatai_ts", "base", 64),
    Case("treesatai_ts", "base", 64, ("model.checkpointing=blocks",)),
    Case("flair_hub", "base", 32),
    Case("flair_hub", "large", 16, ("deepspeed.zero_optimization.stage=1",)),
    Case("flair_hub", "large", 16, ("model.checkpointing=blocks",)),
    Case("treesatai_ts", "base", 64, ("train.precision=bf16_weights",)),
)


def rehearsed(cases: tuple[Case, ...], number: int) -> tuple[Case, ...]:
    """The first ``number`` cases with a micro-batch of 2; their models are made small by ``case_recipe``."""
    return tuple(Case(c.dataset, c.size, 2, c.sets) for c in cases[:number])


def case_recipe(case: Case, rehearse: bool, *sets: str) -> Recipe:
    """The recipe of a case: no tracking, no pictures, no checkpoint before the end."""
    return bench_recipe(
        case.dataset,
        rehearse,
        f"model.size={case.size}",
        f"train.global_batch={case.micro_batch}",
        f"train.micro_batch={case.micro_batch}",
        *case.sets,
        *sets,
    )


def bench_recipe(dataset: str, rehearse: bool, *sets: str) -> Recipe:
    """The shipped recipe of ``dataset`` with ``sets``; in a rehearsal with a tiny model, whatever size is asked for."""
    fixed = [
        "data.lanes=1",
        "tracking.enabled=false",
        "tracking.pictures_every=0",
        "checkpoint.every_steps=1000000",
        "train.epochs=null",
        "train.steps=1000000",
        "train.warmup_check=false",
        "train.log_every=1000000",
    ]
    tiny = []
    if rehearse:
        sets = tuple(s for s in sets if not s.startswith(("model.size=", "model={")))
        tiny += [_TINY_MODEL, "train.device=cpu"]  # also on a machine with a GPU
        if sensors := _TINY_SENSORS[dataset]:
            tiny.append(f"data.mixture[0].sensors={sensors}")
    return load_recipe(RECIPES / f"{dataset}.yaml", [*fixed, *tiny, *sets])


def small_recipe(shards: Path, work: Path, rehearse: bool, *sets: str) -> Recipe:
    """A small model on synthetic TreeSatAI-TS shards; every step is logged."""
    return bench_recipe(
        "treesatai_ts",
        rehearse,
        _SMALL_MODEL,
        f"data.mixture[0].shards={shards}",
        "data.mixture[0].split=[train]",
        f"data.cache_dir={work / 'cache'}",
        "data.workers=0",
        "data.lanes=2",
        "optim.base_lr=3.0e-4",
        "train.log_every=1",
        *sets,
    )


def specs_of(recipe: Recipe) -> list[DatasetSpec]:
    """The resolved spec of each dataset of a recipe, without its shards."""
    return [
        resolve_spec(datasets.spec(e.dataset), e, i, recipe.model.spectral)
        for i, e in enumerate(recipe.data.mixture)
    ]


def config_of(recipe: Recipe) -> ModelConfig:
    """The model of a recipe, without its shards."""
    return build_model_config(recipe, specs_of(recipe))
