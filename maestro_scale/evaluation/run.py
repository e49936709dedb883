"""Orchestration of an evaluation: one encoder on one benchmark, over folds, seeds and modes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maestro_scale.errors import shorten
from maestro_scale.escaping import printable, printable_lines, shell_command
from maestro_scale.evaluation.benchmark import Benchmark, Provenance
from maestro_scale.evaluation.encoder import Encoder
from maestro_scale.evaluation.finetune.finetune import MODES as TRAINED_MODES
from maestro_scale.evaluation.finetune.finetune import Stopped, finetune
from maestro_scale.evaluation.finetune.predictor import TRAINABLE
from maestro_scale.evaluation.finetune.tested import MODE as TEST
from maestro_scale.evaluation.finetune.tested import evaluate_finetuned
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.report.summary import summarise
from maestro_scale.evaluation.results import ORACLE, RESULTS, EvalResult, EvaluationError
from maestro_scale.evaluation.tasks.folds import Splits, find_folds, fold_splits
from maestro_scale.evaluation.tasks.protocol import LossSettings
from maestro_scale.evaluation.tasks.subset import train_split
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.recipe import Recipe, load_recipe
from maestro_scale.secrets_filter import scrub_tree
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.manifest_cache import load_manifest
from maestro_scale.training.binding import Launch
from maestro_scale.training.device import DeviceSetting
from maestro_scale.training.distributed import World, destroy_process_group, init_distributed
from maestro_scale.training.manifests import ManifestMonitor, UsedDataset, compare_manifests
from maestro_scale.training.observer import Observer
from maestro_scale.training.run_dir import lock
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.watchdog import Watchdog, monitored

ObserversFor = Callable[[Recipe], Sequence[Observer]]
"""The observers of a finetuning, on rank 0: they follow its loss and validation scores, in MLflow for example."""

RecordResult = Callable[[Path | None, EvalResult, Path], object]
"""Called with (checkpoint, result, path of its results.json); checkpoint None: the encoder has no training run."""

# Rank 0 fits a classifier while the others wait at a collective: longer than the default time limit of one.
_COLLECTIVE_TIMEOUT_S = 24 * 3600


@dataclass(frozen=True)
class EvalOptions:
    """One evaluation, as given on the command line of ``evaluate.py``. ``overrides``: ``KEY=VALUE`` of the recipe."""

    recipe: str
    out: Path
    checkpoint: str | None = None
    baseline: str | None = None
    modes: Sequence[str] = ()
    """Empty: ``evaluation.modes`` of the recipe."""
    target: str | None = None
    fraction: float = 1.0
    splits: Splits = field(default_factory=dict)
    """Splits in shards by role; a role that is not given is the split of that name."""
    folds: Sequence[int] | Literal["all"] = ()
    """Folds of cross-validation, or all that the shards hold; empty: none."""
    seeds: Sequence[int] = ()
    """Empty: the seed of the recipe."""
    maps: bool = False
    features: Path | None = None
    overrides: Sequence[str] = ()

    def mode_dir(self, mode: str) -> Path:
        """The folder of a mode's results; another one for each fraction of the labels."""
        return self.out / (mode if self.fraction == 1 else f"{mode}_{100 * self.fraction:.12g}pct")


@dataclass(frozen=True)
class EvalRun:
    """One fold and seed. ``fold`` None: no cross-validation. ``subdir``: where its results go within ``mode_dir``."""

    fold: int | None
    splits: Splits
    seed: int
    subdir: Path


def plan_runs(options: EvalOptions, recipe: Recipe, stored: Sequence[str]) -> list[EvalRun]:
    """Every fold with every seed. ``stored``: the splits in shards.

    EvaluationError where the shards lack a fold, or options contradict each other.
    """
    seeds = options.seeds or (recipe.seed,)
    folds: Mapping[int | None, Splits] = {None: options.splits}
    if options.folds:
        if options.splits:
            raise EvaluationError("--folds says which splits are train, val and test: leave --split out")
        # Without any fold, fold 1 is asked for, so that the error names the splits there are.
        numbers = tuple(find_folds(stored)) or (1,) if options.folds == "all" else options.folds
        folds = {number: fold_splits(stored, number) for number in numbers}
    return [
        EvalRun(
            fold, splits, seed, Path(f"fold_{fold}" * (len(folds) > 1), f"seed_{seed}" * (len(seeds) > 1))
        )
        for fold, splits in folds.items()
        for seed in seeds
    ]


def _used_splits(runs: Sequence[EvalRun], manifest: Manifest) -> tuple[str, ...]:
    """The stored splits that the runs read."""
    names = (n for run in runs for role in ("train", "val", "test") for n in run.splits.get(role, (role,)))
    return tuple(name for name in dict.fromkeys(names) if name in manifest.splits)


def _check_splits(
    runs: Sequence[EvalRun], options: EvalOptions, modes: Sequence[str], manifest: Manifest
) -> None:
    """EvaluationError where a split is missing that a mode reads, before an encoder is loaded."""
    train, _ = train_split(manifest, options.fraction)
    reads = (
        {"test": "test"} if set(modes) <= {TEST, ORACLE} else {"train": train, "val": "val", "test": "test"}
    )
    for run in runs:
        for role, split in reads.items():
            missing = [name for name in run.splits.get(role, (split,)) if name not in manifest.splits]
            if missing:
                raise EvaluationError(
                    f"{manifest.spec.name} has no split {shorten(missing[0])} in shards (there are: "
                    f"{', '.join(manifest.splits)}), needed for {role}: write it with `maestro-scale shard … --split "
                    f"{role}`, or name another one with --split {role}=NAME"
                )


def overlap_warnings(runs: Sequence[EvalRun]) -> list[str]:
    """A line per run and role whose splits are test splits too: such a score says nothing about other tiles."""
    return [
        f"warning: {', '.join(both)}{f' of fold {r.fold}' if r.fold else ''} is both test and {role}: the score is "
        "measured on tiles that were used to fit or to select"
        for r in runs
        for role in ("train", "val")
        if (both := sorted({*r.splits.get("test", ("test",))} & {*r.splits.get(role, (role,))}))
    ]


def run_evaluation(
    options: EvalOptions,
    progress: ProgressFactory = no_progress,
    record: RecordResult | None = None,
    observers_for: ObserversFor = lambda recipe: (),
    stop: StopRequest | None = None,
) -> None:
    """Evaluate, and write ``results.json`` per mode: of several runs their mean, with each run's own below it.

    ``record`` stores results elsewhere too, where the recipe has tracking on. Everything that can be refused is
    refused before the first batch: MaestroError with one line. Interrupted, the same call resumes. ``stop``: installed
    while a finetuning trains.
    """
    recipe = load_recipe(options.recipe, options.overrides)
    modes = tuple(dict.fromkeys(options.modes or recipe.evaluation.modes))
    if options.baseline == ORACLE:
        modes = (ORACLE,)
    manifest = load_manifest(recipe.data.mixture[0].shards, Path(recipe.data.cache_dir))
    runs = plan_runs(options, recipe, manifest.splits)
    _check_splits(runs, options, modes, manifest)
    encoder = Encoder(recipe, options.checkpoint, options.baseline, runs[0].fold, manifest)
    trained_modes = set(modes) & set(TRAINED_MODES)
    trains = bool(trained_modes)
    encoder.check([run.fold for run in runs], trained_modes)
    if TEST in modes:
        encoder.check_finetuned()
    if set(modes) != {TEST}:  # a finetuned model has a spec of its own
        task_for(encoder.spec, options.target)  # refused here: nothing is written yet
    world = _init_distributed(trains or TEST in modes, recipe.train.device)
    url = recipe.data.mixture[0].shards
    dataset = UsedDataset(manifest.spec.name, url, manifest, _used_splits(runs, manifest))
    with _watched(world, recipe.train.hang_timeout_s, options.out) as watchdog, ExitStack() as locks:
        compare_manifests(world, [dataset])
        if world is None or world.is_main:
            for mode in modes:
                if mode not in TRAINED_MODES:  # those lock their run directory themselves
                    locks.enter_context(lock(options.mode_dir(mode)))
        evaluation = _Evaluation(
            options, modes, world, watchdog, progress, observers_for, stop or StopRequest()
        )
        evaluation.print_lines(overlap_warnings(runs))
        if record is None or not recipe.tracking.enabled:
            record = _no_record
        _evaluate_runs(evaluation, encoder, runs, record, ManifestMonitor([dataset]))
    if world is not None:
        destroy_process_group()


def _evaluate_runs(
    evaluation: _Evaluation,
    encoder: Encoder,
    runs: Sequence[EvalRun],
    record: RecordResult,
    monitor: ManifestMonitor,
) -> None:
    """Evaluate every run, and write the results of each and their summary."""
    options, modes = evaluation.options, evaluation.modes
    results: dict[str, list[tuple[str, EvalResult]]] = {mode: [] for mode in modes}
    try:
        for run in runs:
            encoder = encoder.for_fold(run.fold)
            for mode, result in evaluation.evaluate(encoder, run):
                path = options.mode_dir(mode) / run.subdir / RESULTS
                result.write(path)
                if encoder.per_fold:  # each fold has a training run of its own to be recorded under
                    record(_training_run(mode, encoder), result, path)
                results[mode].append((str(run.subdir / RESULTS), result))
                monitor.check()
    except Stopped as stopped:
        evaluation.print_lines([f"{stopped.args[0]}: stopped; resume with the same command"])
    for mode, of_mode in results.items():
        if len(of_mode) < len(runs):
            continue  # stopped, or not rank 0, which alone has results
        result, path = summarise(of_mode), options.mode_dir(mode) / RESULTS
        if len(runs) > 1:
            result.write(path)
        if not encoder.per_fold:
            record(_training_run(mode, encoder), result, path)
        print(f"{mode}: {score_text(result)}, {path}", flush=True)
        for sensors, score in result.by_sensors.items():
            print(f"  {sensors}: {result.kind.title} {result.kind.number(score.value)}", flush=True)
    if any(results.values()):
        command = shell_command("maestro-scale", "report", options.out, "--out", "report.html")
        print(f"next: {command}", flush=True)


@contextmanager
def _watched(world: World | None, timeout_s: float, out: Path) -> Iterator[Watchdog | None]:
    """Run a watchdog that has paused: a rank that is alive may fit, or wait for the others, for any time."""
    if world is None:
        yield None
        return
    with monitored(world, timeout_s, out) as watchdog:
        watchdog.pause()
        yield watchdog


def score_text(result: EvalResult) -> str:
    """``mIoU 65.6 (64.0-67.0)``, or ``mIoU 65.6 ± 0.4 over 3 seeds, 5 folds``."""
    kind, units = result.kind, printable(f" {result.units}" if result.units else "")
    # Runs without random numbers agree for every seed: their variation is that over tiles.
    if result.deviation:
        spread = f"± {kind.number(result.deviation)}{units}"
    else:
        spread = f"({'-'.join(kind.number(bound) for bound in result.interval)}){units}"
    counts = {"seeds": len(result.seeds), "folds": len(result.folds)}
    over = ", ".join(f"{n} {what}" for what, n in counts.items() if n > 1)
    return f"{kind.title} {kind.number(result.value)} {spread}" + (f" over {over}" if over else "")


@dataclass(frozen=True)
class _Inputs:
    """What one run evaluates. ``recipe``: with the run's seed."""

    encoder: Encoder
    recipe: Recipe
    benchmark: Benchmark
    provenance: Provenance
    subdir: Path


@dataclass(frozen=True)
class _Evaluation:
    """What all runs share. ``world`` None: one process, and no collective is needed."""

    options: EvalOptions
    modes: Sequence[str]
    world: World | None
    watchdog: Watchdog | None
    progress: ProgressFactory
    observers_for: ObserversFor
    stop: StopRequest

    @property
    def is_main(self) -> bool:
        return self.world is None or self.world.is_main

    def print_lines(self, lines: Sequence[str]) -> None:
        """Print on rank 0."""
        if lines and self.is_main:
            print(printable_lines("\n".join(lines)), flush=True)

    def evaluate(self, encoder: Encoder, run: EvalRun) -> Iterator[tuple[str, EvalResult]]:
        """(mode, result) of a run, on rank 0; the other ranks compute along and yield nothing."""
        recipe = load_recipe(self.options.recipe, [*self.options.overrides, f"seed={run.seed}"])
        plain = scrub_tree(recipe.model_dump(mode="json"))
        inputs = _Inputs(
            encoder,
            recipe,
            self._benchmark(encoder, recipe, run),
            Provenance(
                encoder.step,
                recipe.seed,
                plain,
                encoder.name,
                encoder.trained_on,
                encoder.weights,
                encoder.adaptation,
                encoder.architecture,
            ),
            run.subdir,
        )
        if ORACLE in self.modes:
            yield from self._oracle(inputs)
            return
        if frozen := [mode for mode in self.modes if mode not in (*TRAINED_MODES, TEST)]:
            yield from self._frozen(inputs, frozen)
        for mode in self.modes:
            if mode in TRAINED_MODES:
                yield from self._trained(inputs, mode)
            elif mode == TEST:
                yield from self._tested(inputs)

    def _oracle(self, inputs: _Inputs) -> Iterator[tuple[str, EvalResult]]:
        # Here, because it imports SciPy, which no other mode needs.
        from maestro_scale.evaluation.oracle.oracle import evaluate_oracle

        result = evaluate_oracle(
            inputs.benchmark,
            inputs.provenance,
            inputs.recipe.data.workers,
            self.world,
            self._maps_dir(ORACLE, inputs.subdir),
            self._progress,
        )
        if result is not None:
            yield ORACLE, result

    def _frozen(self, inputs: _Inputs, modes: Sequence[str]) -> Iterator[tuple[str, EvalResult]]:
        model, notes = inputs.encoder.for_benchmark(trains=False)
        self.print_lines(notes)
        results = evaluate_frozen(
            model,
            inputs.benchmark,
            modes,
            inputs.provenance,
            inputs.recipe.data.workers,
            self.world,
            {mode: path for mode in modes if (path := self._maps_dir(mode, inputs.subdir)) is not None},
            self._progress,
            inputs.recipe.train.device,
            inputs.recipe.train.precision,
        )
        for result in results:
            yield result.mode, result

    def _tested(self, inputs: _Inputs) -> Iterator[tuple[str, EvalResult]]:
        assert self.world is not None  # joined for this mode
        result = evaluate_finetuned(
            inputs.encoder.finetuned,
            inputs.benchmark,
            inputs.recipe,
            self.world,
            inputs.provenance,
            self._maps_dir(TEST, inputs.subdir),
        )
        if result is not None:
            yield TEST, result

    def _trained(self, inputs: _Inputs, mode: str) -> Iterator[tuple[str, EvalResult]]:
        model, notes = inputs.encoder.for_benchmark(trains=True)
        provenance = inputs.provenance
        if mode == "scratch":  # what the encoder was trained on plays no part
            provenance = dataclasses.replace(provenance, step=0, trained_on=(), weights="")
        else:
            self.print_lines(notes)
        assert self.world is not None  # joined where a mode trains
        assert isinstance(model, TRAINABLE)  # else Encoder.check refused it
        result = finetune(
            model,
            inputs.benchmark,
            inputs.recipe,
            mode,
            self.options.mode_dir(mode) / inputs.subdir,
            self.world,
            provenance,
            self._maps_dir(mode, inputs.subdir),
            self._progress,
            self.observers_for(inputs.recipe) if self.is_main else (),
            _training_run(mode, inputs.encoder),
            self.stop,
            self.watchdog,
        )
        if result is not None:
            yield mode, result

    @property
    def _progress(self) -> ProgressFactory:
        return self.progress if self.is_main else no_progress

    def _benchmark(self, encoder: Encoder, recipe: Recipe, run: EvalRun) -> Benchmark:
        entry = recipe.data.mixture[0]
        return Benchmark(
            spec=encoder.spec,
            shards=entry.shards,
            cache_dir=Path(recipe.data.cache_dir),
            features_dir=self.options.features or self.options.out / "features",
            cache_bytes=int(recipe.data.cache_gib * 2**30),
            target=self.options.target,
            fraction=self.options.fraction,
            splits=run.splits,
            fold=run.fold,
            manifest=encoder.manifest,
            loss=LossSettings(recipe.evaluation.class_weights, recipe.evaluation.regression_loss),
            trains_on_incomplete=entry.incomplete == "use",
        )

    def _maps_dir(self, mode: str, subdir: Path) -> Path | None:
        return self.options.mode_dir(mode) / subdir / "maps" if self.options.maps else None


def _init_distributed(trains: bool, device: DeviceSetting) -> World | None:
    """The process group, where there are several ranks or DeepSpeed needs one."""
    ranks = Launch.from_env(os.environ).size
    return init_distributed(_COLLECTIVE_TIMEOUT_S, device) if ranks > 1 or trains else None


def _training_run(mode: str, encoder: Encoder) -> Path | None:
    """The checkpoint whose training run a result belongs to; None where no pretrained weight is in it."""
    return None if mode == "scratch" else encoder.path


def _no_record(checkpoint: Path | None, result: EvalResult, path: Path) -> None:
    """Record nothing."""
