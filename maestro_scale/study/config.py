"""The configuration of a study: data, base recipes, factors with levels, questions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from maestro_scale.errors import KeyPath, did_you_mean, dotted, shorten
from maestro_scale.recipe.errors import ConflictError, RecipeError
from maestro_scale.recipe.fields import Count, Place, Section, distinct, each_once, listed, some
from maestro_scale.recipe.loading import read_tree, validated
from maestro_scale.strict_yaml.merge import Tree
from maestro_scale.study.keys import Key, Keys, without_fixed
from maestro_scale.training.metrics.gpus import GPUS

Mode = Literal["knn", "probe", "attentive", "finetune", "scratch"]
Name = Annotated[str, Field(pattern=r"^\w[\w.\-]*$", max_length=60)]
"""Part of a file name: letters, digits, ``_``, ``-`` and ``.``."""
Levels = dict[str, str]
"""A level for each of some factors."""
Fraction = Annotated[float, Field(gt=0, le=1)]

MAX_CELLS = 5_000
"""Of a scale. The grid grows exponentially with the number of factors."""

MAX_SAMPLER_SEED = 2**31
"""NumPy's random numbers, which the samplers use, take seeds below 2³²; trials add their number."""

MAX_NUMBER = 1e15
"""Of the range of a search; whole numbers up to it are exact."""

DATASET = "dataset"
"""Where cells are listed or excluded: the name of a setup, beside the factors."""
ENCODER = "encoder"
"""In the keys of a level: no pretraining; instead a baseline of evaluate.py, or SCRATCH."""
SCRATCH = "scratch"
"""Value of ENCODER: the network of the recipe trained end to end on the labels, without pretraining."""


class Data(Section):
    """A dataset in shards: existing ones, or a synthetic one that the study writes."""

    dataset: Annotated[str, Field(min_length=1)]
    """The dataset's name, as in its manifest."""
    shards: Place | None = None
    """Folder or s3:// prefix of existing shards; null: synthetic tiles, written once below the root of the studies."""
    tiles: dict[Name, Count] = Field(default_factory=dict)
    """Tiles by split: of synthetic data, or of existing shards that the machine of --dry-run cannot read."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the synthetic tiles."""
    window_m: Annotated[float, Field(gt=0)] | None = None
    """Synthetic tiles of pastis_hd: this many metres of the middle of each scene, so that there are many independent
    tiles; null: whole scenes."""

    @model_validator(mode="after")
    def _check_source(self) -> Data:
        if self.shards is not None and self.window_m is not None:
            raise ConflictError((("window_m",), "is of synthetic tiles: leave it out where shards are given"))
        if self.shards is None and not self.tiles:
            reason = "give shards, or tiles by split (train, val, test) of synthetic data"
            raise ConflictError((("tiles",), reason))
        return self


class Evaluations(Section):
    """A benchmark on which every cell is evaluated, and the ways of evaluation.

    The recipe of an evaluation is the base recipe without the levels, so that every cell is evaluated by the same
    protocol, with those keys of the levels that the encoder needs: ``model`` without ``init_from``, and of the first
    dataset ``sensors`` and ``crop_m``.
    """

    name: Name
    """Name of the benchmark in folders, questions and tables."""
    data: Data | None = None
    """The benchmark; null: the data of the pretraining."""
    recipe: Place | None = None
    """Recipe of the evaluation, for a benchmark on other data than the pretraining; null: as described above."""
    set: Keys = Field(default_factory=dict)
    """Changes to the recipe of the evaluation, e.g. the length of a finetuning."""
    modes: Annotated[tuple[Mode, ...], BeforeValidator(listed), AfterValidator(distinct)] = ("knn", "probe")
    """Ways of evaluation. scratch is chosen by a level with ``encoder: scratch``: it then replaces finetune."""
    fractions: Annotated[tuple[Fraction, ...], AfterValidator(distinct)] = (1.0,)
    """Fractions of the training labels."""
    target: str | None = None
    """What to predict; null: the first target of the dataset."""
    splits: dict[Literal["train", "val", "test"], tuple[str, ...]] = Field(default_factory=dict)
    """Splits in shards by role, where they have other names than the role."""

    @model_validator(mode="after")
    def _check_modes(self) -> Evaluations:
        if SCRATCH in self.modes:
            reason = (
                "scratch needs no checkpoint: add a level {encoder: scratch} to a factor, and mode finetune"
            )
            raise ConflictError((("modes",), reason))
        if self.data is not None and self.recipe is None:
            reason = "a benchmark on other data than the pretraining needs a recipe of its own"
            raise ConflictError((("recipe",), reason))
        return self


class Setup(Section):
    """What a study does with one dataset: its data, the base recipe, seeds, evaluations, baselines."""

    data: Data
    """The dataset of the pretraining; it replaces the shards of the base recipe's first dataset."""
    base: Place
    """Base recipe, a path relative to this file."""
    set: Keys = Field(default_factory=dict)
    """Changes to the base recipe, for all cells and their evaluations."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(distinct)]
    """Every cell is run with each of these seeds."""
    evaluations: Annotated[tuple[Evaluations, ...], AfterValidator(some)]
    """The benchmarks on which the encoders are evaluated."""
    baselines: Annotated[tuple[str, ...], AfterValidator(each_once)] = ()
    """Encoders of evaluate.py --baseline that are evaluated beside the cells in the frozen modes, e.g. random."""

    @model_validator(mode="after")
    def _check_names(self) -> Setup:
        names = [e.name for e in self.evaluations]
        if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
            raise ConflictError((("evaluations",), f"the name {twice} is given twice"))
        return self


def _known_gpu(kind: str) -> str:
    if kind not in GPUS:
        raise ValueError(
            f"unknown GPU {shorten(kind)}{did_you_mean(kind, GPUS)}; use one of {', '.join(GPUS)}"
        )
    return kind


class Gpu(Section):
    """The machine for which the plan of a scale is computed."""

    kind: Annotated[str, AfterValidator(_known_gpu)] = "h100"
    """GPU model, as in ``maestro-scale plan --gpu``."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Fraction of the peak FLOP/s that matrix products reach."""


class Scale(Section):
    """A size at which the study can be run."""

    datasets: Annotated[dict[Name, Setup | None], Field(min_length=1)]
    """The datasets by a name of choice; null: leave out one that an extended file has."""
    gpu: Gpu | None = None
    """Each cell runs on one GPU of this kind; null: on the CPU."""
    mode: Mode = "probe"
    """The way of evaluation that is compared by questions that name none."""

    @property
    def setups(self) -> dict[str, Setup]:
        """The datasets that are used, by name."""
        return {name: setup for name, setup in self.datasets.items() if setup is not None}


class Question(Section):
    """A claim about two groups of cells that are compared in pairs (same seed, same tiles, same other levels)."""

    name: Name
    """Short name in tables and figures."""
    claim: Annotated[str, Field(min_length=1)]
    """What the claim says, as a sentence."""
    better: Annotated[Levels, Field(min_length=1)]
    """The levels that are claimed to be better."""
    worse: Annotated[Levels, Field(min_length=1)]
    """The levels that they are compared with."""
    mode: Mode | Literal[""] = ""
    """The way of evaluation that is compared; empty: that of the scale. With a level ``encoder: scratch``, finetune
    means scratch."""
    worse_mode: Mode | None = None
    """The way of evaluation of ``worse``; null: that of ``better``."""
    at_least: float = 0.0
    """The claim holds if the difference better - worse exceeds this: 0.02 is 2 percentage points, of RMSE in its units;
    negative: not worse by more."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """The claim is that both are equivalent: the difference lies between -margin and margin. Units as of ``at_least``,
    which it excludes."""
    fraction: Fraction = 1.0
    """Fraction of the training labels."""
    datasets: Annotated[tuple[Name, ...], BeforeValidator(listed), AfterValidator(each_once)] = ()
    """Datasets of the scale for which the question is asked; empty: all."""
    benchmark: Name | None = None
    """Name of the evaluation; null: the first of the dataset."""

    @model_validator(mode="after")
    def _check_claim(self) -> Question:
        # A level that only one side names holds for the other side too.
        is_same = {**self.worse, **self.better} == {**self.better, **self.worse}
        if is_same and self.worse_mode in (None, self.mode):
            reason = "has the cells of better: name another level of the same factor"
            raise ConflictError((("worse",), reason))
        if self.margin is not None and self.at_least:
            raise ConflictError((("margin",), "excludes at_least: keep one"))
        return self


class Range(Section):
    """Values of a recipe key in a search: a range, or a list of choices."""

    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Sample the logarithm uniformly."""
    integer: bool = False
    """Whole numbers only."""
    choices: tuple[str | int | float | bool, ...] = ()
    """Instead of a range: one of these."""

    @model_validator(mode="after")
    def _check_kind(self) -> Range:
        is_range = self.low is not None and self.high is not None
        if is_range == bool(self.choices) or (self.low is None) != (self.high is None):
            raise ConflictError((("choices",), "give either low and high, or choices"))
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ConflictError((("high",), f"{self.high:g} is not above low {self.low:g}"))
            if not max(abs(self.low), abs(self.high)) <= MAX_NUMBER:
                raise ConflictError((("high",), f"numbers are at most {MAX_NUMBER:g}"))
            if self.integer and not (self.low.is_integer() and self.high.is_integer()):
                raise ConflictError((("integer",), f"{self.low:g} or {self.high:g} is not a whole number"))
            if self.log and self.low <= 0:
                raise ConflictError((("low",), "must be above 0 with log"))
        return self


class Sample(Section):
    """A search for the best value of one objective instead of the full grid (needs optuna)."""

    method: Literal["tpe", "random"] = "tpe"
    """Tree-structured Parzen estimator, or uniform sampling."""
    trials: Count
    """Number of cells; each is run with all seeds of the setup."""
    space: Annotated[dict[Key, Range], Field(min_length=1), AfterValidator(without_fixed)]
    """The recipe keys that are searched."""
    mode: Mode = "probe"
    """The way of evaluation whose score, the mean over the seeds, is maximised: of the first evaluation that has it,
    with its first fraction of the labels."""
    dataset: Name | None = None
    """The dataset of the scale; null: its first."""
    seed: Annotated[int, Field(ge=0, le=MAX_SAMPLER_SEED)] = 0
    """Seed of the sampler."""


class Study(Section):
    """An ablation study. Created by ``load_study``."""

    name: Name
    """Name of the study and of its folder."""
    claim: Annotated[str, Field(min_length=1)]
    """The conclusion that the study tests, in a sentence or two."""
    scales: Annotated[dict[Name, Scale], Field(min_length=1)]
    """Sizes at which the study can be run, e.g. cpu and gpu; one is chosen with ``--scale``."""
    factors: dict[Name, Annotated[dict[Name, Keys], Field(min_length=1)]] = Field(default_factory=dict)
    """Factor → level → recipe keys that the level sets. ``encoder: random`` (or another baseline, or scratch) among
    the keys: the level needs no pretraining. The cells are all combinations, unless ``cells`` lists them."""
    cells: tuple[Levels, ...] = ()
    """The combinations that are run, instead of all; a factor that is not named has its first level. ``dataset``
    restricts an entry to a dataset of the scale."""
    exclude: tuple[Levels, ...] = ()
    """Combinations that are left out: all cells that have these levels (and this ``dataset``)."""
    questions: tuple[Question, ...] = ()
    """The claims that the study tests."""
    sample: Sample | None = None
    """Search instead of the grid."""

    @model_validator(mode="after")
    def _check_names(self) -> Study:
        problems = [*self._unknown_levels(), *self._unknown_setups()]
        names = [q.name for q in self.questions]
        problems += [
            (("questions", i, "name"), f"{name} is given twice")
            for i, name in enumerate(names)
            if name in names[:i]
        ]
        if DATASET in self.factors:
            problems.append((("factors", DATASET), "is the name of the setups of a scale: rename the factor"))
        if self.sample is not None and (self.factors or self.cells):
            problems.append((("sample",), "searches keys of the recipe: leave out factors and cells"))
        problems += [*self._large_scales(), *self._search_without_score()]
        if problems:
            raise ConflictError(*problems)
        return self

    def _large_scales(self) -> Iterator[tuple[KeyPath, str]]:
        grid = len(self.cells) or math.prod(map(len, self.factors.values()))
        for name, scale in self.scales.items():
            count = sum((grid + len(s.baselines)) * len(s.seeds) for s in scale.setups.values())
            if count > MAX_CELLS:
                yield (
                    ("scales", name),
                    f"has {count:,} cells, more than {MAX_CELLS:,}: use fewer factors, levels or seeds, or list cells",
                )

    def _search_without_score(self) -> Iterator[tuple[KeyPath, str]]:
        if self.sample is None:
            return
        for name, scale in self.scales.items():
            setup = scale.setups.get(self.sample.dataset or next(iter(scale.setups), ""))
            if setup is not None and all(self.sample.mode not in e.modes for e in setup.evaluations):
                yield (
                    ("sample", "mode"),
                    f"no evaluation of scale {name} has the mode {self.sample.mode}: add it there",
                )

    def _unknown_levels(self) -> Iterator[tuple[KeyPath, str]]:
        named: list[tuple[KeyPath, Mapping[str, str]]] = []
        named += [(("cells", i), levels) for i, levels in enumerate(self.cells)]
        named += [(("exclude", i), levels) for i, levels in enumerate(self.exclude)]
        for i, question in enumerate(self.questions):
            named += [
                (("questions", i, "better"), question.better),
                (("questions", i, "worse"), question.worse),
            ]
        for where, levels in named:
            for factor, level in levels.items():
                if factor == DATASET and where[0] != "questions":
                    known = self._setup_names()
                elif factor not in self.factors:
                    yield (*where, factor), f"unknown factor{did_you_mean(factor, self.factors)}"
                    continue
                else:
                    known = tuple(self.factors[factor])
                if level not in known:
                    yield (*where, factor), f"unknown level {level!r}{did_you_mean(level, known)}"

    def _unknown_setups(self) -> Iterator[tuple[KeyPath, str]]:
        known = self._setup_names()
        for i, question in enumerate(self.questions):
            for unknown in (n for n in question.datasets if n not in known):
                yield (
                    ("questions", i, "datasets"),
                    f"unknown dataset {unknown!r}{did_you_mean(unknown, known)}",
                )
        name = self.sample.dataset if self.sample is not None else None
        if name is not None and name not in known:
            yield ("sample", "dataset"), f"unknown dataset {name!r}{did_you_mean(name, known)}"

    def _setup_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for scale in self.scales.values() for name in scale.datasets))


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, what it extends, ``section.key=value`` overrides and the environment.

    Paths of recipes are relative to the file that gives them. Raises RecipeError: one line per mistake.
    """
    tree = read_tree(path, overrides, "study")
    return validated(Tree(_with_absolute_paths(tree, Path(path)), tree.origins, tree.texts), Study)


def _with_absolute_paths(tree: Tree, study: Path) -> dict[str, Any]:
    """The data of ``tree`` with ``base`` and ``recipe`` relative to the file that set them."""

    def changed(node: Any, loc: KeyPath) -> Any:
        if isinstance(node, dict):
            return {key: changed(value, (*loc, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [changed(value, (*loc, i)) for i, value in enumerate(node)]
        is_recipe = (loc[-1], len(loc)) in (("base", 5), ("recipe", 7))
        if loc[0] != "scales" or not is_recipe or not isinstance(node, str):
            return node
        if "\0" in node:
            raise RecipeError(f"{study}: {dotted(loc)}: {shorten(node)} is not a path")
        origin = Path(tree.origin(loc))
        file = origin if origin.suffix else study  # --set: relative to the study file
        return str(file.resolve().parent / Path(node).expanduser())

    return changed(tree.data, ())
