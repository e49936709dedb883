"""The recipe as one object: its sections, the checks across sections, and the values derived from several of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, model_validator

from maestro_scale.errors import KeyPath, dotted
from maestro_scale.recipe import engine_config
from maestro_scale.recipe.data import Data
from maestro_scale.recipe.errors import ConflictError, RecipeError
from maestro_scale.recipe.fields import Section, nearest_divisors
from maestro_scale.recipe.sections import (
    Checkpoint,
    Evaluation,
    Masking,
    Model,
    Optim,
    Tracking,
    Train,
)
from maestro_scale.secrets_filter import scrub_tree
from maestro_scale.stream.dates import FirstDate
from maestro_scale.strict_yaml import environment
from maestro_scale.strict_yaml.merge import dump_yaml

Scalar = str | int | float | bool


class Recipe(Section):
    """All settings of a run. Created by ``load_recipe``; equal recipes give equal runs."""

    name: Annotated[str, Field(pattern=r"^\w[\w.\-]*$", max_length=200)]
    """Name of the run and of its directory: letters, digits, ``_``, ``-`` and ``.``."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of samples, and all random numbers of the data (crops, dates, masks)."""
    data: Data
    """Where the samples come from and how they are read."""
    model: Model = Model()
    """The network and its pretraining task."""
    masking: Masking = Masking()
    """How much of the input is masked."""
    optim: Optim = Optim()
    """AdamW and its schedule."""
    train: Train = Field(default_factory=lambda: Train(epochs=100))
    """Length, batch sizes and precision of training."""
    deepspeed: dict[str, Any] = Field(
        default_factory=lambda: {"zero_optimization": {"stage": engine_config.DEFAULT_STAGE}}
    )
    """DeepSpeed's own config; see ``deepspeed_config`` for what is filled in."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are written and how many are kept."""
    tracking: Tracking = Tracking()
    """MLflow and pictures."""
    evaluation: Evaluation = Evaluation()
    """Evaluation on benchmarks: frozen features and finetuning."""

    @property
    def lr(self) -> float:
        """Peak learning rate: base_lr · sqrt(global_batch / 3) (MAESTRO, arXiv 2508.10894)."""
        return self.optim.base_lr * math.sqrt(self.train.global_batch / 3)

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return engine_config.stage_of(self.deepspeed)

    @property
    def first_date(self) -> FirstDate:
        """``data.first_date`` of a new run."""
        return "any" if self.data.first_date == "auto" else self.data.first_date

    @property
    def has_structural_masks(self) -> bool:
        """``masking.structure`` of a new run: whether modalities, dates, locations and band groups are masked whole."""
        if self.masking.structure == "auto":
            return self.model.fusion in ("group", "mod")
        return self.masking.structure

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches of a rank per optimizer step.

        Raises:
            RecipeError: the ranks do not fit the batch or the lanes.
            ValueError: the micro-batch is auto; see ``with_micro_batch``.
        """
        check_world(self, world_size)
        return self.train.global_batch // (world_size * self.train.samples_per_micro_batch)

    def deepspeed_config(self, world_size: int, device: str | None = None) -> dict[str, Any]:
        """The config for ``deepspeed.initialize`` on ``world_size`` ranks.

        ``device`` (``cpu``, ``cuda``, …) decides what ``train.precision: auto`` means; not needed otherwise.

        Raises:
            RecipeError: the ranks do not fit the batch or the lanes, or the section contradicts the recipe.
            ValueError: the precision is auto and no device is given.
        """
        check_world(self, world_size)
        if device is None and self.train.precision == "auto":
            raise ValueError("train.precision is auto: pass the device that it depends on")
        derived = self._derived(world_size, self.train.precision_on(device or ""))
        problems = engine_config.problems(self.deepspeed, derived)
        if lines := [f"deepspeed.{dotted(path)}: {reason}" for path, reason in problems]:
            raise RecipeError("\n".join(lines))
        return engine_config.complete_config(self.deepspeed, derived)

    def with_micro_batch(self, micro_batch: int) -> Recipe:
        """This recipe with a micro-batch of that many samples; settings of DeepSpeed that follow from it are dropped.

        The only way from ``train.micro_batch: auto`` to a number: the run's recipe.yaml keeps ``auto``.
        """
        if micro_batch == self.train.micro_batch:
            return self
        train = self.train.model_copy(update={"micro_batch": micro_batch})
        rest = {k: v for k, v in self.deepspeed.items() if k not in engine_config.FROM_MICRO_BATCH}
        return self.model_copy(update={"train": train, "deepspeed": rest})

    def with_zero_stage(self, stage: int) -> Recipe:
        """This recipe with another ZeRO stage; settings of the section that only other stages have are dropped.

        At stage 0 bf16_weights, which it does not support, becomes bf16.
        """
        zero = dict(self.deepspeed.get("zero_optimization", {}))
        if stage != self.zero_stage:
            zero = {k: v for k, v in zero.items() if not k.startswith(("stage3_", "offload_"))}
        train = self.train
        if stage == 0 and train.precision == "bf16_weights":
            train = train.model_copy(update={"precision": "bf16"})
        deepspeed = {**self.deepspeed, "zero_optimization": {**zero, "stage": stage}}
        return self.model_copy(update={"train": train, "deepspeed": deepspeed})

    def to_yaml(self) -> str:
        """The recipe as YAML with all defaults written out; loading it gives an equal recipe on any machine."""
        return dump_yaml(environment.escape(self.model_dump(mode="json")))

    def to_redacted_yaml(self) -> str:
        """As ``to_yaml``, with secrets hidden. Values are filtered before the conversion to YAML: quoted and folded
        text would no longer match the patterns of secrets."""
        return dump_yaml(environment.escape(scrub_tree(self.model_dump(mode="json"))))

    def flat(self) -> dict[str, Scalar]:
        """``{"optim.base_lr": 3e-05, "data.mixture[0].dataset": …}``; null is the text ``null``."""
        return dict(_leaves(self.model_dump(mode="json"), ()))

    def _derived(self, world_size: int | None, precision: str | None) -> engine_config.Derived:
        train = self.train
        micro_batch = None if train.micro_batch == "auto" else train.micro_batch
        return engine_config.Derived(train.global_batch, micro_batch, self.optim.clip, world_size, precision)

    @model_validator(mode="after")
    def _check_across_sections(self) -> Recipe:
        problems: list[tuple[KeyPath, str]] = []
        lanes, batch = self.data.lanes, self.train.global_batch
        if batch % lanes:
            near = nearest_divisors(lanes, batch)
            reason = f"{lanes} does not divide train.global_batch {batch}: use {near}"
            problems.append((("data", "lanes"), reason))
        if self.masking.band_group and self.model.spectral == "joint":
            reason = "needs model.spectral=token, as a joint token holds all bands: set it to 0"
            problems.append((("masking", "band_group"), reason))
        precision = None if self.train.precision == "auto" else self.train.precision
        found = engine_config.problems(self.deepspeed, self._derived(None, precision))
        problems += [(("deepspeed", *path), reason) for path, reason in found]
        if self.train.deterministic and self.model.attention in ("cudnn", "flash_attn"):
            reason = (
                f"{self.model.attention!r} has no deterministic backward pass here, which train.deterministic asks "
                "for: use auto, flash, efficient or math"
            )
            problems.append((("model", "attention"), reason))
        mode = self.model.compile
        if not problems and mode != "none" and self.zero_stage == 3:
            reason = (
                f"{mode!r} does not work with ZeRO stage 3, which gathers weights in hooks of the compiled "
                "modules: set it to none, or use stage 2"
            )
            problems.append((("model", "compile"), reason))
        if problems:
            raise ConflictError(*problems)
        return self


def check_world(recipe: Recipe, world_size: int) -> None:
    """RecipeError, with values that would fit, unless ``world_size`` ranks can share the lanes and the batch."""
    lanes, batch = recipe.data.lanes, recipe.train.global_batch
    # auto chooses a divisor of the share of any number of ranks
    micro = 1 if recipe.train.micro_batch == "auto" else recipe.train.micro_batch
    if world_size < 1:
        raise RecipeError(f"{world_size} ranks: a run needs at least one")
    fits = [w for w in range(1, lanes + 1) if lanes % w == 0 and batch % (w * micro) == 0]
    ranks = f"{recipe.name} runs on {', '.join(map(str, fits))} ranks" if fits else "no number of ranks fits"
    if lanes % world_size:
        shared = [n for n in range(world_size, batch + 1, world_size) if batch % n == 0]
        hint = f", or set data.lanes={min(shared, key=lambda n: abs(n - lanes))}" if shared else ""
        raise RecipeError(f"data.lanes: {lanes} cannot be shared evenly by {world_size} ranks: {ranks}{hint}")
    if batch % (world_size * micro):
        # lanes divide the batch and ranks divide the lanes, so the share of a rank is whole
        share = batch // world_size
        near = nearest_divisors(micro, share)
        raise RecipeError(
            f"train.micro_batch: {world_size} ranks share train.global_batch {batch}, {share} each, which "
            f"micro_batch {micro} does not divide: set train.micro_batch to {near}; "
            f"with {micro} {ranks}"
        )


def _leaves(node: Any, loc: KeyPath) -> Iterator[tuple[str, Scalar]]:
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from _leaves(value, (*loc, key))
    else:
        yield dotted(loc), node if isinstance(node, Scalar) else json.dumps(node)
