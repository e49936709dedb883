"""The ``quickstart`` command: the full pipeline on synthetic data, from raw tiles to the scores of the encoder.

Each stage writes its result to the output folder and is skipped if the result exists, so the command can be repeated
after an interruption. Stages are processes that are forked from this one, which imports torch, DeepSpeed and MLflow
once. On the CPU two lanes of stages run at the same time: the pretraining and its evaluation, and the baselines.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from maestro_scale import untrusted
from maestro_scale.entry import print_error
from maestro_scale.errors import MaestroError
from maestro_scale.escaping import shell_command
from maestro_scale.evaluation.results import ORACLE, EvalResult, EvaluationError
from maestro_scale.recipe import Recipe, build_model_config, load_recipe, resolve_spec
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.strict_yaml import shipped
from maestro_scale.study.processes import (
    STOPPED,
    StopFlag,
    fork,
    last_error,
    num_gpus,
    preload,
    run_entry,
    wait,
)
from maestro_scale.training.run_dir import JsonLines, has_finished, write_atomically

DATASET = "treesatai_ts"
NUM_TILES = 1000
SPLITS = ("train", "val", "test")
PRETRAINED, SCRATCH = "pretrained", "scratch"
FROZEN = ("knn", "probe")
ENCODERS: dict[str, tuple[str, ...]] = {
    PRETRAINED: FROZEN,
    SCRATCH: (SCRATCH,),
    "statistics": FROZEN,
    "untrained": FROZEN,
    ORACLE: (ORACLE,),
}
"""The modes of each row of the result table."""
LABELS = {SCRATCH: "scratch, equal cost"}
PREDICTED_BY = {
    "knn": "kNN on features",
    "probe": "linear probe",
    SCRATCH: "trained network",
    ORACLE: "class signatures",
}
_LANES = 2


class QuickstartError(MaestroError):
    """A stage failed; the message says which one and what to do."""


@dataclass(frozen=True)
class QuickstartPaths:
    """The paths below the output folder. ``shards_url``: an s3:// prefix (or folder) for the shards instead."""

    out: Path
    shards_url: str = ""

    @property
    def raw(self) -> Path:
        """The synthetic dataset in its raw layout."""
        return self.out / "raw"

    @property
    def shards(self) -> str:
        """The dataset in shards."""
        return self.shards_url or str(self.out / "shards")

    @property
    def runs(self) -> Path:
        """The run directories, with MLflow's database."""
        return self.out / "runs"

    @property
    def run(self) -> Path:
        """The run directory of the pretraining."""
        return self.runs / "quickstart"

    @property
    def results(self) -> Path:
        """The folder of the results on frozen features, and of the oracle."""
        return self.out / "results"

    @property
    def done(self) -> Path:
        """File that is written last, with the settings of the run."""
        return self.out / "done.json"

    def result(self, encoder: str, mode: str) -> Path:
        """The results.json of a mode. That of a training is in its run directory."""
        return (self.runs if mode == SCRATCH else self.results / encoder) / mode / "results.json"


def quickstart(
    out: Path, seed: int = 0, tiles: int = NUM_TILES, steps: int | None = None, shards: str = ""
) -> None:
    """Run all stages that have not finished yet, and print the scores.

    ``steps``: pretraining steps, instead of the recipe's; ``shards``: where to write the shards, instead of ``out``.
    Raises QuickstartError, and SystemExit(STOPPED) after a signal.
    """
    console = Console(soft_wrap=True)
    if out.exists() and not out.is_dir():
        raise QuickstartError(f"--out {out}: is a file; give a folder, existing or new")
    paths = QuickstartPaths(out.resolve(), shards)
    settings = {"seed": seed, "tiles": tiles, "steps": steps, **({"shards": shards} if shards else {})}
    if paths.done.exists():
        previous = untrusted.read_record(paths.done)
        if previous != settings:
            raise QuickstartError(
                f"{out} was created with {previous}, not {settings}: remove it, or use another --out"
            )
    if paths.done.exists() and _scores(paths):
        console.print(f"already done, in {paths.out}; remove it to start over")
    else:
        _run_stages(console, paths, seed, tiles, steps)
    _summary(console, paths)
    write_atomically(paths.done, json.dumps(settings))


def num_threads() -> int:
    """Number of compute threads of a lane: OMP_NUM_THREADS, else its part of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max((os.cpu_count() or 1) // _LANES, 1)


def equal_cost_steps(recipe: Recipe) -> int:
    """Steps of a supervised training of the encoder, with the same batch, that take the FLOPs of the pretraining.

    A pretraining step computes the encoder on the visible tokens and the decoder, a supervised one the encoder on all.
    The head of the latter, validation and probes are not counted.
    """
    from maestro_scale.model.cost import compute_cost, encoder_flops

    entry = recipe.data.mixture[0]
    spec = resolve_spec(Manifest.load(entry.shards).spec, entry, spectral=recipe.model.spectral)
    config = build_model_config(recipe, [spec])
    assert recipe.train.steps is not None  # quickstart.yaml sets it
    pretraining = recipe.train.steps * compute_cost(config, recipe.masking.ratio).step_flops
    return max(1, round(pretraining / (3 * encoder_flops(config))))


def _run_stages(console: Console, paths: QuickstartPaths, seed: int, tiles: int, steps: int | None) -> None:
    recipe = shipped.find("recipe", "quickstart")
    if recipe is None:
        raise QuickstartError(
            "the recipe quickstart is missing in this installation: reinstall maestro-scale"
        )
    stop, threads = StopFlag().install(), num_threads()
    # While the tiles are written, this process imports what the later stages need.
    writing = fork(lambda: _write_data(console, paths, seed, tiles), None, session=True)
    stop.children.add(writing)
    has_gpu = _has_gpu()
    if not has_gpu:
        preload(threads)
    _check(wait(writing, stop), stop, "writing the shards")
    overrides = [
        f"seed={seed}",
        f"data.mixture[0].shards={json.dumps(paths.shards)}",
        f"data.cache_dir={json.dumps(str(paths.out / 'cache'))}",
        "train.micro_batch=32",  # the global batch: it runs on one rank
        *([f"train.steps={steps}"] if steps else []),
        # A demonstration: it uses the CPU where torch cannot use the GPUs of this machine.
        *([] if has_gpu else ["train.device=cpu"]),
    ]
    stages = _Stages(paths, recipe, overrides, threads)
    lanes = [stages.pretrained, stages.baselines]
    console.print(
        f"[bold]3/4[/bold] pretraining, run directory {paths.run}; baselines, logs in {stages.logs}"
    )
    if has_gpu:  # one GPU is enough for everyone, but not for two at a time
        for lane in lanes:
            _check(wait(fork(lane, None, session=True), stop), stop, "training or evaluation")
        return
    running = [fork(lane, None, session=True) for lane in lanes]
    stop.children.update(running)
    try:
        for pid in running:
            _check(wait(pid, stop), stop, "training or evaluation")
    except QuickstartError:
        for pid in running:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGTERM)
                wait(pid, stop)
        raise


def _check(code: int, stop: StopFlag, what: str) -> None:
    if stop.is_set or code == STOPPED:
        print_error("stopped: run the same command again to resume")
        raise SystemExit(STOPPED)
    if code:
        raise QuickstartError(f"{what} failed with exit code {code}, see above; run the same command again")


def _has_gpu() -> bool:
    import torch

    # In another process: it may initialise CUDA, which forked processes could not use again.
    return torch.backends.cuda.is_built() and num_gpus() > 0


def _write_data(console: Console, paths: QuickstartPaths, seed: int, tiles: int) -> int:
    from maestro_scale import datasets
    from maestro_scale.shards.read.verify import verify
    from maestro_scale.shards.write.writer import write_shards

    console.print(f"[bold]1/4[/bold] {tiles} synthetic tiles in {paths.raw}")
    datasets.synth(DATASET, paths.raw, tiles, seed)
    console.print(f"[bold]2/4[/bold] shards in {paths.shards}")
    for split in SPLITS:
        raw = datasets.open_raw(DATASET, paths.raw, split)
        write_shards(raw, paths.shards, split, workers=2, codec="raw", shard_mb=16, seed=seed, synthetic=True)
    problems = verify(paths.shards)
    if problems:
        raise QuickstartError(f"the shards are damaged: {problems[0]}; remove {paths.shards} and run again")
    manifest = Manifest.load(paths.shards)
    console.print(f"      {len(manifest.shards)} shards, verified")
    return 0


@dataclass(frozen=True)
class _Stages:
    """The stages after sharding, in two lanes. ``overrides``: of the recipe."""

    paths: QuickstartPaths
    recipe: Path
    overrides: Sequence[str]
    threads: int

    @property
    def logs(self) -> Path:
        return self.paths.out / "logs"

    def pretrained(self) -> int:
        """Pretrain, export and evaluate; returns the exit code."""
        stop = StopFlag().install()
        if not has_finished(self.paths.run):
            words = [f"--recipe={self.recipe}", f"--run-dir={self.paths.run}", "--set", *self.overrides]
            # Its progress is that of the command: not in the log.
            code = wait(fork(partial(run_entry, "train", words, self.threads), None), stop)
            if code or stop.is_set:
                return code
        print("4/4 evaluation of the frozen encoder", flush=True)
        words = [f"--checkpoint={self.paths.run}"]
        return self._run("export", self._export, stop) or self._evaluate(PRETRAINED, words, stop)

    def baselines(self) -> int:
        """Train from scratch, and evaluate the other baselines; returns the exit code."""
        stop = StopFlag().install()
        steps = equal_cost_steps(load_recipe(str(self.recipe), self.overrides))
        course = [
            f"train.steps={steps}",
            "data.mixture[0].split=train",  # labels of val select the weights
            "evaluation.ema=0.99",
            "evaluation.validations=10",
            "evaluation.patience=0",
        ]
        words = {
            SCRATCH: ["--baseline=untrained", "--set", *course],
            **{
                name: [f"--baseline={name}", "--set", "tracking.enabled=false"]
                for name in ("statistics", "untrained", ORACLE)
            },
        }
        for encoder, more in words.items():
            code = self._evaluate(encoder, more, stop)
            code = code or self._run(f"{encoder}-mlflow", partial(self._record, encoder), stop)
            if code:
                return code
        return 0

    def _evaluate(self, encoder: str, words: Sequence[str], stop: StopFlag) -> int:
        """Run evaluate.py unless its results exist. ``words``: may end with overrides of the recipe."""
        if _load(self.paths, encoder) is not None:
            return 0
        modes = [] if encoder == ORACLE else [f"--mode={mode}" for mode in ENCODERS[encoder]]
        out = self.paths.runs if encoder == SCRATCH else self.paths.results / encoder
        common = [f"--recipe={self.recipe}", f"--out={out}", f"--features={self.paths.out / 'features'}"]
        command = [*common, *modes, "--set", *self.overrides, *words]
        return self._run(encoder, partial(run_entry, "evaluate", command, self.threads), stop)

    def _run(self, name: str, work: Callable[[], int], stop: StopFlag) -> int:
        """Exit code of a stage, whose output goes to a log."""
        if stop.is_set:
            return STOPPED
        log = self.logs / f"{name}.txt"
        code = wait(fork(work, log), stop)
        if stop.is_set:
            return STOPPED
        if code:
            print_error(f"{name}: {last_error(log)} (exit code {code}), log {log}")
        return code

    def _export(self) -> int:
        from maestro_scale.interop.export import export_model
        from maestro_scale.training.checkpoint.folder import newest

        export_model(newest(self.paths.run), self.paths.out / "model")
        return 0

    def _record(self, encoder: str) -> int:
        """Record results of a baseline in MLflow, as a run beside that of the pretraining."""
        from maestro_scale.tracking.evaluations import record_encoder

        recipe = load_recipe(str(self.recipe), self.overrides)
        paths = [self.paths.result(encoder, mode) for mode in ENCODERS[encoder]]
        if recipe.tracking.enabled:
            found = [(EvalResult.load(path), path) for path in paths]
            record_encoder(self.paths.runs / encoder, recipe.tracking.experiment, encoder, found)
        return 0


def _load(paths: QuickstartPaths, encoder: str) -> dict[str, EvalResult] | None:
    """{mode: result}; None if one is missing or damaged."""
    try:
        return {mode: EvalResult.load(paths.result(encoder, mode)) for mode in ENCODERS[encoder]}
    except EvaluationError:
        return None


def _scores(paths: QuickstartPaths) -> dict[str, dict[str, EvalResult]] | None:
    """{encoder: {mode: result}}; None if one is missing or damaged."""
    found = {name: results for name in ENCODERS if (results := _load(paths, name)) is not None}
    return found if len(found) == len(ENCODERS) else None


def result_table(scores: dict[str, dict[str, EvalResult]]) -> Table:
    """A row per encoder and mode. Mean average precision shows also what a network ranks well, but does not yet predict
    with a probability above one half, as the F1 score requires."""
    table = Table(title="Held-out tiles, %: weighted F1 (95 % interval), mean average precision")
    for column in ("encoder", "predicted by"):
        table.add_column(column)
    for column in ("wF1", "mAP"):
        table.add_column(column, justify="right")
    for name, results in scores.items():
        for mode, r in results.items():
            f1 = f"{100 * r.value:.1f} ({100 * r.interval[0]:.1f}-{100 * r.interval[1]:.1f})"
            precision = f"{100 * r.scores['mean_average_precision']:.1f}"
            table.add_row(LABELS.get(name, name), PREDICTED_BY[mode], f1, precision)
    return table


def _summary(console: Console, paths: QuickstartPaths) -> None:
    scores = _scores(paths)
    if scores is None:
        raise QuickstartError(f"results are missing in {paths.results}: run the same command again")
    console.print(result_table(scores))
    metrics = JsonLines(paths.run / "metrics.jsonl").read()
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    console.print(f"masked loss: {first:.3f} -> {last:.3f} ({100 * (last / first - 1):+.0f} %)")
    pictures = sorted((paths.run / "pictures").glob("*.png"))
    if pictures:
        console.print(f"reconstruction: {pictures[-1]}")
    print("dashboard: " + shell_command("maestro-scale", "dashboard", paths.runs))
