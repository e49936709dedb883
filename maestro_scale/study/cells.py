"""Expansion of a study into cells: one resolved recipe, or an encoder without pretraining, with a seed and evaluations.

A cell has a directory below ROOT/cells that is named by a readable prefix and a hash of all that determines its result.
So a cell that two studies share, or that is repeated after a kill, is run once, and a changed recipe is another cell.
An evaluation has a directory in the cell, named by the benchmark and a hash of the protocol.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maestro_scale.errors import did_you_mean, shorten
from maestro_scale.evaluation.baselines.content import content_digest, files_below, files_digest
from maestro_scale.evaluation.baselines.registry import UNTRAINED, baseline_kind
from maestro_scale.evaluation.results import ORACLE, RESULTS, EvalResult, EvaluationError
from maestro_scale.evaluation.run import EvalOptions
from maestro_scale.evaluation.tasks.protocol import LossSettings
from maestro_scale.recipe import Recipe, RecipeError, load_recipe
from maestro_scale.study import data as study_data
from maestro_scale.study.config import (
    DATASET,
    ENCODER,
    SCRATCH,
    Data,
    Evaluations,
    Levels,
    Scale,
    Setup,
    Study,
)
from maestro_scale.study.keys import key_path

RESULT_VERSION = 1
"""Part of every hash. Raise it when a change of the code changes the results of training or of an evaluation."""

TRAINED_MODES = ("finetune", "scratch")

# Keys of a recipe that do not change its results.
_RUNTIME = {
    "": ("name", "tracking", "checkpoint", "evaluation"),
    "data": ("cache_dir", "cache_gib", "workers", "retry_s"),
    "train": ("log_every", "hang_timeout_s", "collect_every", "audit", "warmup_check"),
}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a cell. ``folder``: its directory; ``recipe``: with the seed of the cell.

    ``identity``: what determines the result, beside the encoder.
    """

    benchmark: str
    mode: str
    fraction: float
    folder: Path
    recipe: Recipe
    data: Data
    target: str | None
    splits: Mapping[str, tuple[str, ...]]
    identity: Mapping[str, Any] = field(repr=False)

    @property
    def results(self) -> Path:
        """Path of its results.json."""
        options = EvalOptions(recipe="", out=self.folder, fraction=self.fraction)
        return options.mode_dir(self.mode) / RESULTS

    @property
    def is_finished(self) -> bool:
        """Whether there is a result that can be read."""
        return self.load() is not None

    def load(self) -> EvalResult | None:
        """The result; None if it, or the counts per tile that belong to it, are missing or damaged."""
        try:
            result = EvalResult.load(self.results)
            if result.counts_sha256:
                result.load_counts(self.results)
        except EvaluationError:
            return None
        return result


@dataclass(frozen=True)
class Cell:
    """One point of a study: its directory, what is trained, how it is evaluated.

    ``dataset``: name of the setup; ``levels``: of every factor, empty for a baseline of the setup; ``encoder``: None if
    the cell pretrains, else a baseline or ``scratch``; ``identity``: what determines the weights of the encoder.
    """

    dataset: str
    levels: Mapping[str, str]
    seed: int
    encoder: str | None
    directory: Path
    recipe: Recipe = field(repr=False)
    data: Data = field(repr=False)
    evaluations: tuple[Evaluation, ...] = field(repr=False)
    identity: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.directory.name

    @property
    def label(self) -> str:
        """Dataset, levels and seed, as the study names them."""
        levels = [f"{factor}={level}" for factor, level in self.levels.items()] or [
            f"baseline={self.encoder}"
        ]
        return " ".join([self.dataset, *levels, f"seed={self.seed}"])

    @property
    def is_finished(self) -> bool:
        """Whether all evaluations have a result."""
        return all(evaluation.is_finished for evaluation in self.evaluations)


def expand(study: Study, scale: str, root: Path) -> list[Cell]:
    """All cells of a study at one scale, in the order in which they are run: complete grids, seed by seed, so that an
    interrupted study has all levels of the first seeds. RecipeError where a recipe or level is invalid."""
    chosen, root = scale_of(study, scale), root.resolve()
    return [
        cell
        for name, setup in chosen.setups.items()
        for seed in setup.seeds
        for cell in (*_grid(study, name, setup, seed, root), *_baselines(name, setup, seed, root))
    ]


def scale_of(study: Study, name: str) -> Scale:
    """A scale by name; RecipeError if there is none."""
    if name not in study.scales:
        raise RecipeError(f"{study.name}: unknown scale {name!r}{did_you_mean(name, study.scales)}")
    return study.scales[name]


def combinations(study: Study, dataset: str) -> list[Levels]:
    """The levels of the cells of a dataset: the listed ones or the full grid, without the excluded ones."""
    if study.cells:
        first = {factor: next(iter(levels)) for factor, levels in study.factors.items()}
        listed = [c for c in study.cells if c.get(DATASET, dataset) == dataset]
        grid = [{**first, **{f: v for f, v in c.items() if f != DATASET}} for c in listed]
    else:
        factors = [[(factor, level) for level in levels] for factor, levels in study.factors.items()]
        grid = [dict(levels) for levels in itertools.product(*factors)]
    if study.sample is not None:
        return []
    kept = (c for c in grid if not any(_matches({**c, DATASET: dataset}, e) for e in study.exclude))
    return list({tuple(c.items()): c for c in kept}.values())  # a listed cell may be there twice


def make_cell(
    dataset: str, setup: Setup, seed: int, root: Path, levels: Levels, keys: Mapping[str, Any]
) -> Cell:
    """A cell whose levels set ``keys`` of the recipe."""
    keys = dict(keys)
    encoder = keys.pop(ENCODER, None)
    if encoder is not None:
        _check_encoder(encoder)
    recipe = _load(setup.base, {**setup.set, **keys, **_fixed(setup.data, seed, root)}, setup.data, levels)
    shared = {**setup.set, **dict(inputs_and_network(keys))}
    identity = _encoder_identity(encoder, recipe, setup.data)
    named = [_plain(recipe.data.mixture[0].dataset)]
    if encoder is None:
        named += [recipe.model.fusion, recipe.model.spectral, recipe.model.target]
    else:
        named.append(_plain(encoder)[:40])
    directory = root / "cells" / f"{'-'.join([*named, f's{seed}', _digest(identity)[:10]])}"
    evaluations = tuple(
        evaluation
        for group in setup.evaluations
        for evaluation in _evaluations(group, setup, encoder, recipe, shared, directory, root)
    )
    if not evaluations:
        kinds = "finetune" if encoder == SCRATCH else "knn, probe or attentive"
        raise RecipeError(
            f"{dataset}: no mode of its evaluations is for {ENCODER} {shorten(encoder)}: add {kinds}, or leave it out"
        )
    return Cell(dataset, dict(levels), seed, encoder, directory, recipe, setup.data, evaluations, identity)


def inputs_and_network(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those keys of a level that an evaluation shares: what a sample of the benchmark is (sensors, crop) and the
    network. All others are of the pretraining alone, as the evaluation is one protocol for all cells."""
    for key, value in keys.items():
        if _is_shared(key_path(key)):
            yield key, value
        elif isinstance(value, Mapping):  # a whole section
            yield from inputs_and_network({f"{key}.{name}": part for name, part in value.items()})
        elif isinstance(value, list | tuple):
            yield from inputs_and_network({f"{key}[{i}]": part for i, part in enumerate(value)})


def _is_shared(path: tuple[str, ...]) -> bool:
    if path[0] == "model":  # a finetuning starts from the weights of the cell, not from init_from
        return len(path) > 1 and path[1] != "init_from"
    # The benchmark is the first dataset of the mixture.
    return path[:3] == ("data", "mixture", "0") and path[3:4] in (("sensors",), ("crop_m",))


def distinct(cells: Sequence[Cell]) -> list[Cell]:
    """One cell per directory, with the evaluations of all: cells whose levels make no difference are run once."""
    merged: dict[Path, Cell] = {}
    for cell in cells:
        first = merged.setdefault(cell.directory, cell)
        known = {e.results for e in first.evaluations}
        more = tuple(e for e in cell.evaluations if e.results not in known)
        if more:
            merged[cell.directory] = Cell(**{**vars(first), "evaluations": (*first.evaluations, *more)})
    return list(merged.values())


def _grid(study: Study, dataset: str, setup: Setup, seed: int, root: Path) -> Iterator[Cell]:
    for levels in combinations(study, dataset):
        keys: dict[str, Any] = {}
        for factor, level in levels.items():
            keys |= study.factors[factor][level]
        yield make_cell(dataset, setup, seed, root, levels, keys)


def _baselines(dataset: str, setup: Setup, seed: int, root: Path) -> Iterator[Cell]:
    for baseline in setup.baselines:
        yield make_cell(dataset, setup, seed, root, {}, {ENCODER: baseline})


def _evaluations(
    group: Evaluations,
    setup: Setup,
    encoder: str | None,
    of_cell: Recipe,
    keys: Mapping[str, Any],
    directory: Path,
    root: Path,
) -> Iterator[Evaluation]:
    """The evaluations of a benchmark, those on frozen features first: they take less time."""
    data = group.data or setup.data
    base, common = (setup.base, keys) if group.recipe is None else (group.recipe, {})
    recipe = _load(base, {**common, **group.set, **_fixed(data, of_cell.seed, root)}, data)
    # Written by the study itself, below the MLflow run of the cell, also where there is no training run.
    recipe = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"enabled": False})})
    splits: dict[str, tuple[str, ...]] = {role: names for role, names in group.splits.items()}  # noqa: C416 - str keys
    for mode in _modes(group.modes, encoder):
        identity = _protocol(recipe, mode, data, group)
        if encoder in UNTRAINED and recipe.model != of_cell.model:
            # evaluate.py builds it from this recipe; the hash of the cell is of the other one.
            identity["model"] = _identity(recipe, data)["model"]
        folder = directory / "evaluations" / f"{group.name}-{_digest(identity)[:8]}"
        for fraction in group.fractions:
            yield Evaluation(group.name, mode, fraction, folder, recipe, data, group.target, splits, identity)


def _modes(modes: Sequence[str], encoder: str | None) -> list[str]:
    """Of a cell: from scratch there is no frozen encoder; baselines are not finetuned, except the random network."""
    if encoder == SCRATCH:
        return [SCRATCH for mode in modes if mode == "finetune"]
    ordered = sorted(modes, key=lambda mode: mode in TRAINED_MODES)
    return [m for m in ordered if encoder is None or m not in TRAINED_MODES]


def _check_encoder(encoder: Any) -> None:
    """RecipeError unless it names a baseline of evaluate.py, or is SCRATCH."""
    if not isinstance(encoder, str):
        raise RecipeError(
            f"{ENCODER} of a level is {shorten(encoder)}: give the name of a baseline, or {SCRATCH}"
        )
    if encoder == ORACLE:
        raise RecipeError(f"{ORACLE} is no encoder: run evaluate.py --baseline {ORACLE} beside the study")
    if encoder != SCRATCH:
        try:
            baseline_kind(encoder)
        except EvaluationError as error:
            raise RecipeError(str(error)) from error


def _fixed(data: Data, seed: int, root: Path) -> dict[str, Any]:
    """The keys that the study sets; after all others, which may replace the whole entry of the dataset."""
    return {"data.mixture[0].shards": study_data.place(data, root), "seed": seed}


def _load(base: str, keys: Mapping[str, Any], data: Data, levels: Mapping[str, str] | None = None) -> Recipe:
    try:
        recipe = load_recipe(base, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    except RecipeError as error:
        if not levels:
            raise
        named = ", ".join(f"{factor}={level}" for factor, level in levels.items())
        raise RecipeError(f"{named}: {error}") from error
    if recipe.data.mixture[0].dataset != data.dataset:
        raise RecipeError(
            f"{base}: data.mixture[0].dataset is {recipe.data.mixture[0].dataset!r}, the data of the study is "
            f"{data.dataset!r}: use another base recipe"
        )
    return recipe


def _plain(name: str) -> str:
    """A readable part of a file name; names of different cells differ in their hash."""
    shown = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return shown.replace(".", "-", 1) if shown.startswith(".") else shown


def _matches(levels: Mapping[str, str], pattern: Mapping[str, str]) -> bool:
    return all(levels.get(factor) == level for factor, level in pattern.items())


def _encoder_identity(encoder: str | None, recipe: Recipe, data: Data) -> dict[str, Any]:
    """What determines the weights: of a baseline neither the training nor, without weights, the network."""
    whole = _identity(recipe, data)
    common = {"version": RESULT_VERSION, "encoder": encoder, "seed": recipe.seed}
    if encoder is not None and (content := content_digest(encoder)):
        common["content"] = content
    if encoder is None:
        return {**common, "recipe": whole}
    view = {k: v for k, v in whole["data"]["mixture"][0].items() if k not in ("split", "weight")}
    if encoder in (SCRATCH, *UNTRAINED):
        return {**common, "data": view, "model": whole["model"]}
    return {**common, "data": view}


def _protocol(recipe: Recipe, mode: str, data: Data, group: Evaluations) -> dict[str, Any]:
    whole = _identity(recipe, data)
    common = {
        "version": RESULT_VERSION,
        "target": group.target,
        "splits": {role: list(names) for role, names in group.splits.items()},
    }
    if mode in TRAINED_MODES:
        evaluation = recipe.evaluation.model_dump(mode="json", exclude={"overlap"})  # of maps, no score
        return {**common, "recipe": {**whole, "evaluation": evaluation}}
    train = {key: whole["train"][key] for key in ("precision", "device")}
    found = {**common, "seed": recipe.seed, "data": whole["data"]["mixture"][0], "train": train}
    if mode != "knn":  # it has no loss
        settings = recipe.evaluation
        found |= LossSettings(settings.class_weights, settings.regression_loss).identity()
    return found


def _identity(recipe: Recipe, data: Data) -> dict[str, Any]:
    """A recipe without what does not change results; the address of the study's data is replaced by its identity, so
    that the folder of the study plays no part."""
    plain = recipe.model_dump(mode="json")
    for section, keys in _RUNTIME.items():
        for key in keys:
            (plain[section] if section else plain).pop(key, None)
    if plain["model"]["decoder"] == "attentive":  # the only one before there was a setting
        del plain["model"]["decoder"]
    plain["data"]["mixture"][0]["shards"] = study_data.identity(data)
    for entry in plain["data"]["mixture"]:
        if entry["incomplete"] == "use":  # added later: cells that were computed before keep their identity
            del entry["incomplete"]
    if recipe.model.init_from and (folder := Path(recipe.model.init_from).expanduser()).is_dir():
        plain["model"]["init_from"] = files_digest(files_below(folder)) or recipe.model.init_from
    return plain


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
