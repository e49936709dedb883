"""The ``quickstart`` command: the full pipeline on synthetic data, from raw tiles to the scores of the encoder.

Each stage writes its result to the output folder and is skipped if the result exists, so the command can be repeated
after an interruption.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError
from maestro_scale.escaping import shell_command
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.parent_death import end_with_parent
from maestro_scale.training.distributed import free_port
from maestro_scale.training.run_dir import JsonLines, write_atomically

DATASET = "treesatai_ts"
NUM_TILES = 1000
SPLITS = ("train", "val", "test")
ENCODERS = ("pretrained", "untrained")
MODES = ("knn", "probe")


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
    def run(self) -> Path:
        """The run directory of the pretraining."""
        return self.out / "runs" / "quickstart"

    @property
    def results(self) -> Path:
        """The folder of the evaluation results."""
        return self.out / "results"

    @property
    def done(self) -> Path:
        """File that is written last, with the settings of the run."""
        return self.out / "done.json"


def quickstart(
    out: Path, seed: int = 0, tiles: int = NUM_TILES, steps: int | None = None, shards: str = ""
) -> None:
    """Run all stages that have not finished yet, and print the scores.

    ``steps``: pretraining steps, instead of the recipe's; ``shards``: where to write the shards, instead of ``out``.
    Raises QuickstartError, DatasetError and other expected errors of the stages.
    """
    console = Console(soft_wrap=True)
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
        recipe = find_recipe("quickstart.yaml")
        _synthesize(console, paths, seed, tiles)
        _shard(console, paths, seed)
        _pretrain(console, paths, recipe, seed, steps)
        _evaluate(console, paths, seed)
    _summary(console, paths)
    write_atomically(paths.done, json.dumps(settings))


def find_recipe(name: str) -> Path:
    """Path of a shipped recipe, in the checkout or where pip installed it. Raises QuickstartError if it is missing."""
    folders = (
        Path(__file__).parents[1] / "recipes",
        Path(sysconfig.get_path("data")) / "share/maestro_scale/recipes",
    )
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise QuickstartError(
        f"no recipe {name} in {folders[0]} or {folders[1]}: reinstall maestro-scale, or use a checkout"
    )


def num_threads() -> int:
    """Number of compute threads: OMP_NUM_THREADS, else all cores but one, which the loader uses."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max((os.cpu_count() or 1) - 1, 1)


def _synthesize(console: Console, paths: QuickstartPaths, seed: int, tiles: int) -> None:
    from maestro_scale import datasets

    console.print(f"[bold]1/5[/bold] {tiles} synthetic tiles in {paths.raw}")
    datasets.synth(DATASET, paths.raw, tiles, seed)


def _shard(console: Console, paths: QuickstartPaths, seed: int) -> None:
    from maestro_scale import datasets
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.shards.read.verify import verify
    from maestro_scale.shards.write.writer import write_shards

    console.print(f"[bold]2/5[/bold] shards in {paths.shards}")
    for split in SPLITS:
        raw = datasets.open_raw(DATASET, paths.raw, split)
        write_shards(raw, paths.shards, split, workers=2, codec="raw", shard_mb=16, seed=seed, synthetic=True)
    problems = verify(paths.shards)
    if problems:
        raise QuickstartError(f"the shards are damaged: {problems[0]}; remove {paths.shards} and run again")
    manifest = Manifest.load(paths.shards)
    console.print(f"      {len(manifest.shards)} shards, verified")


def _pretrain(console: Console, paths: QuickstartPaths, recipe: Path, seed: int, steps: int | None) -> None:
    import torch

    console.print(f"[bold]3/5[/bold] pretraining, run directory {paths.run}")
    # The launcher of this environment first: another `deepspeed` on PATH may use another Python.
    launcher = shutil.which(
        "deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if launcher is None:
        raise QuickstartError("the `deepspeed` command is not on PATH: reinstall with pip install deepspeed")
    command = [
        launcher,
        "--num_gpus=1",
        f"--master_port={free_port()}",
        str(Path(__file__).parent / "train.py"),
        f"--recipe={recipe}",
        f"--run-dir={paths.run}",
        "--set",
        f"seed={seed}",
        f"data.mixture[0].shards={json.dumps(paths.shards)}",
        f"data.cache_dir={json.dumps(str(paths.out / 'cache'))}",
        *([f"train.steps={steps}"] if steps else []),
        # A demonstration: it uses the CPU where torch cannot use the GPUs of this machine.
        *([] if torch.cuda.is_available() else ["train.device=cpu"]),
    ]
    log = paths.out / "pretrain.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    code = _run(command, log)
    if code:
        raise QuickstartError(f"pretraining failed with exit code {code}; its output is in {log}")


def _run(command: list[str], log: Path) -> int:
    """Run a command; its output goes to standard error and to the log. Returns the exit code."""
    env = {**os.environ, "OMP_NUM_THREADS": str(num_threads())}
    with (
        log.open("ab") as sink,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            preexec_fn=end_with_parent(),  # the launcher ends its ranks
        ) as process,
    ):
        assert process.stdout is not None  # stdout=PIPE
        # os.read returns what is available, so that the progress bar is shown without delay.
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            sink.write(chunk)
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
    return process.returncode


def _evaluate(console: Console, paths: QuickstartPaths, seed: int) -> None:
    import torch

    from maestro_scale.evaluation.benchmark import Benchmark, Provenance
    from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
    from maestro_scale.interop.export import export_model
    from maestro_scale.interop.pretrained import load_model
    from maestro_scale.model.maestro import Maestro
    from maestro_scale.recipe import load_recipe, resolve_spec
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.training.checkpoint.checkpoints import load_position, newest
    from maestro_scale.training.device import DeviceSetting

    torch.set_num_threads(num_threads())
    console.print("[bold]4/5[/bold] exporting the encoder")
    pretrained = load_model(export_model(newest(paths.run), paths.out / "model"))
    # The baseline: the same architecture with the weights that pretraining started from.
    untrained = Maestro(pretrained.config).initialise(seed).eval()
    console.print("[bold]5/5[/bold] evaluating frozen embeddings on held-out tiles")
    step = load_position(newest(paths.run)).step
    recipe = load_recipe(paths.run / "recipe.yaml")
    spec = resolve_spec(
        Manifest.load(paths.shards).spec, recipe.data.mixture[0], spectral=recipe.model.spectral
    )
    benchmark = Benchmark(spec, paths.shards, paths.out / "cache", paths.out / "features")
    device: DeviceSetting = "auto" if torch.cuda.is_available() else "cpu"
    for name, model, trained in zip(ENCODERS, (pretrained, untrained), (step, 0), strict=True):
        provenance = Provenance(trained, seed, encoder=name, trained_on=(DATASET,) if trained else ())
        for result in evaluate_frozen(model, benchmark, MODES, provenance, device_setting=device):
            result.write(paths.results / name / result.mode / "results.json")


def _scores(paths: QuickstartPaths) -> dict[str, list[EvalResult]] | None:
    """{encoder: one result per mode}; None if one is missing or damaged."""
    try:
        return {
            name: [EvalResult.load(paths.results / name / mode / "results.json") for mode in MODES]
            for name in ENCODERS
        }
    except EvaluationError:
        return None


def _summary(console: Console, paths: QuickstartPaths) -> None:
    scores = _scores(paths)
    if scores is None:
        raise QuickstartError(f"results are missing in {paths.results}: run the same command again")
    metrics = JsonLines(paths.run / "metrics.jsonl").read()
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    table = Table(title="Weighted F1 on held-out tiles, frozen encoder (95 % bootstrap interval)")
    for column in ("encoder", *MODES):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for name, results in scores.items():
        cells = [
            f"{100 * r.value:.1f} ({100 * r.interval[0]:.1f}-{100 * r.interval[1]:.1f})" for r in results
        ]
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"masked loss: {first:.3f} -> {last:.3f} ({100 * (last / first - 1):+.0f} %)")
    pictures = sorted((paths.run / "pictures").glob("*.png"))
    if pictures:
        console.print(f"reconstruction: {pictures[-1]}")
    store = paths.run.parent / "mlflow.db"
    print("dashboard: " + shell_command("maestro-scale", "dashboard", store.parent))
