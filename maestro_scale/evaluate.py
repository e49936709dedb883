"""Score a checkpoint: ``deepspeed maestro_scale/evaluate.py --recipe R --checkpoint C --mode knn --out DIR``.

Writes ``<out>/<mode>/results.json``; with ``--fraction 0.1``, ``<out>/<mode>_10pct/results.json``. Of several seeds or
folds that is the mean; each run's own lies in ``fold_<k>/seed_<s>/`` beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ORACLE = "oracle"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="YAML recipe whose first dataset is the benchmark")
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument(
        "--checkpoint",
        help="a run directory, one of its checkpoints, or an exported model; {fold} in it becomes the fold's number",
    )
    encoder.add_argument(
        "--baseline",
        metavar="NAME",
        help="instead: statistics (of the channels), random (the recipe's model, untrained), image:WEIGHTS "
        "(an image encoder that transformers can load: image:facebook/dinov2-base), or oracle: what can be "
        "reached on synthetic scenes by one who knows how they are made; it has no modes",
    )
    parser.add_argument(
        "--mode",
        choices=("knn", "probe", "attentive", "finetune", "scratch"),
        action="append",
        help="default: evaluation.modes; probe is linear, attentive has the head of a finetuning; finetune and "
        "scratch train by the recipe's optim and train, and continue where they were interrupted",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--target", help="what to predict; default: the dataset's first target")
    parser.add_argument(
        "--fraction",
        type=float,
        default=1.0,
        help="share of the training labels to use, e.g. 0.1: the release's own list where it was sharded (split "
        "train_filtered_10), else drawn by class; smaller ones are part of larger ones",
    )
    parser.add_argument(
        "--split",
        dest="splits",
        metavar="ROLE=SPLITS",
        nargs="+",
        action="extend",
        default=[],
        help="splits in shards that are train, val or test, e.g. train=fold_2,fold_3,fold_4 val=fold_5 test=fold_1",
    )
    parser.add_argument(
        "--folds",
        help="folds of cross-validation, e.g. 1,2,3, or all: fold k rotates the splits fold_1, fold_2, … (PASTIS-HD), "
        "or is split_k_train, split_k_val, split_k_test (FLAIR-HUB); the result is mean and deviation",
    )
    parser.add_argument(
        "--seeds",
        type=_numbers,
        help="fit once per seed, e.g. 0,1,2: mean and deviation (default: the recipe's seed)",
    )
    parser.add_argument(
        "--maps",
        action="store_true",
        help="write what was predicted for whole test tiles as GeoTIFF, in maps/ beside the results",
    )
    parser.add_argument(
        "--features",
        type=Path,
        help="folder for encoded features, kept for later runs and other modes; all ranks must see it "
        "(default: OUT/features)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change the recipe",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code. Expected mistakes become one line on standard error."""
    args = parse(argv)
    from maestro_scale.entry import run_command
    from maestro_scale.secrets_filter import hide_secrets

    hide_secrets()
    return run_command(lambda: _evaluate(args))


def _splits(given: list[str]) -> dict[str, tuple[str, ...]]:
    """``["train=a,b"]`` as ``{"train": ("a", "b")}``; ResultsError if it is nothing of the kind."""
    from maestro_scale.evaluation.results import ResultsError

    splits = {}
    for text in given:
        role, _, names = text.partition("=")
        if role not in ("train", "val", "test") or not all(names.split(",")):
            raise ResultsError(f"--split {text}: expected train=NAME,NAME…, val=… or test=…")
        splits[role] = tuple(names.split(","))
    return splits


def _numbers(text: str) -> tuple[int, ...]:
    """``"0,1,2"`` as numbers, each once."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 0,1,2") from None
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers start at 0")
    return numbers


def _folds(args: argparse.Namespace, shards: str) -> dict[int | None, dict[str, tuple[str, ...]]]:
    """{fold: {role: splits}}; None is what is no fold."""
    from maestro_scale.evaluation.results import ResultsError
    from maestro_scale.evaluation.tasks.folds import find_folds, fold_splits
    from maestro_scale.shards.format.manifest import Manifest

    if args.folds is None:
        return {None: _splits(args.splits)}
    if args.splits:
        raise ResultsError("--folds says which splits are train, val and test: leave --split out")
    splits = Manifest.load(shards).splits
    try:
        numbers = tuple(find_folds(splits)) or (1,) if args.folds == "all" else _numbers(args.folds)
    except argparse.ArgumentTypeError as error:
        raise ResultsError(f"--folds {error}, or all") from None
    return {number: fold_splits(splits, number) for number in numbers}


@dataclass(frozen=True)
class EvalRun:
    """One fold (None: the splits are no fold) and seed. ``within``: its folder within the mode's."""

    fold: int | None
    splits: dict[str, tuple[str, ...]]
    seed: int
    within: Path


def _runs(args: argparse.Namespace, recipe) -> list[EvalRun]:
    folds, seeds = _folds(args, recipe.data.mixture[0].shards), args.seeds or (recipe.seed,)
    return [
        EvalRun(
            fold, splits, seed, Path(f"fold_{fold}" * (len(folds) > 1), f"seed_{seed}" * (len(seeds) > 1))
        )
        for fold, splits in folds.items()
        for seed in seeds
    ]


def _overlap_warnings(parts: Sequence[EvalRun]) -> list[str]:
    """What to tell of splits that take more than one part: a score on tiles that were trained on is none."""
    return [
        f"warning: {', '.join(both)}{f' of fold {p.fold}' if p.fold else ''} is both test and {role}: the score is of "
        "tiles that were learned from"
        for p in parts
        for role in ("train", "val")
        if (both := sorted({*p.splits.get("test", ("test",))} & {*p.splits.get(role, (role,))}))
    ]


def _evaluate(args: argparse.Namespace) -> None:
    from maestro_scale.evaluation.encoder import Encoder
    from maestro_scale.evaluation.finetune.finetune import MODES, Stopped
    from maestro_scale.evaluation.report.summary import summarise
    from maestro_scale.recipe import load_recipe
    from maestro_scale.training.distributed import destroy_process_group, init_distributed

    recipe = load_recipe(args.recipe, args.overrides)
    modes = tuple(dict.fromkeys(args.mode or recipe.evaluation.modes))
    if args.baseline == ORACLE:
        modes = (ORACLE,)
    parts = _runs(args, recipe)
    encoder = Encoder(recipe, args.checkpoint, args.baseline, parts[0].fold)
    encoder.check([part.fold for part in parts], trains=bool(set(modes) & set(MODES)))
    ranks = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    # The others wait while rank 0 fits a classifier.
    world = init_distributed(timeout_s=24 * 3600) if ranks > 1 or set(modes) & set(MODES) else None
    if world is None or world.is_main:
        _print_notes(_overlap_warnings(parts))
    runs: dict[str, list] = {mode: [] for mode in modes}
    try:
        for part in parts:
            encoder = encoder.for_fold(part.fold)
            seeded = load_recipe(args.recipe, [*args.overrides, f"seed={part.seed}"])
            for mode, result in _run(args, seeded, encoder, modes, part, world):
                path = args.out / _folder(mode, args) / part.within / "results.json"
                result.write(path)
                if encoder.per_fold:
                    _record(result, path, encoder, recipe)
                runs[mode].append((str(part.within / "results.json"), result))
    except Stopped as stopped:
        if world is None or world.is_main:
            print(f"{stopped.args[0]}: stopped; the same command continues it", flush=True)
    for mode, of_mode in runs.items():
        if len(of_mode) == len(parts):
            result, path = summarise(of_mode), args.out / _folder(mode, args) / "results.json"
            if len(parts) > 1:
                result.write(path)
            if not encoder.per_fold:
                _record(result, path, encoder, recipe)
            print(f"{mode}: {_score_text(result)}, {path}", flush=True)
    if any(runs.values()):
        print(f"next: maestro-scale report {args.out} --out report.html", flush=True)
    if world is not None:
        destroy_process_group()


def _run(args: argparse.Namespace, recipe, encoder, modes: Sequence[str], part: EvalRun, world):
    """(mode, result) of a part, on rank 0."""
    from maestro_scale.evaluation.benchmark import Benchmark, Provenance
    from maestro_scale.evaluation.finetune.finetune import MODES, finetune
    from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
    from maestro_scale.evaluation.progress import no_progress
    from maestro_scale.secrets_filter import scrub_tree
    from maestro_scale.tracking import terminal

    entry = recipe.data.mixture[0]
    benchmark = Benchmark(
        shards=entry.shards,
        cache_dir=Path(recipe.data.cache_dir),
        features_dir=args.features or args.out / "features",
        cache_bytes=int(recipe.data.cache_gib * 2**30),
        crop_m=entry.crop_m,
        target=args.target,
        fraction=args.fraction,
        splits=part.splits,
        fold=part.fold,
    )
    plain = scrub_tree(recipe.model_dump(mode="json"))
    provenance = Provenance(encoder.step, recipe.seed, plain, encoder.name, encoder.trained_on)

    def maps(mode: str) -> Path:
        return args.out / _folder(mode, args) / part.within / "maps"

    tells = world is None or world.is_main
    progress = terminal.progress if tells else no_progress
    if args.baseline == ORACLE:
        from maestro_scale.evaluation.oracle.oracle import evaluate_oracle

        shown = maps(ORACLE) if args.maps else None
        workers = recipe.data.workers
        result = evaluate_oracle(encoder.view, benchmark, provenance, workers, world, shown, progress)
        if result is not None:
            yield ORACLE, result
        return
    frozen = [m for m in modes if m not in MODES]
    if frozen:
        model, notes = encoder.for_benchmark(trains=False)
        _print_notes(notes if tells else ())
        results = evaluate_frozen(
            model,
            benchmark,
            frozen,
            provenance,
            recipe.data.workers,
            world,
            maps if args.maps else None,
            progress,
        )
        for result in results:
            yield result.mode, result
    for mode in [m for m in modes if m in MODES]:
        model, notes = encoder.for_benchmark(trains=True)
        _print_notes(notes if tells and mode == "finetune" else ())
        origin = provenance if mode == "finetune" else Provenance(0, recipe.seed, plain, encoder.name)
        folder = args.out / _folder(mode, args) / part.within
        maps_dir = maps(mode) if args.maps else None
        result = finetune(model, benchmark, recipe, mode, folder, world, origin, maps_dir, progress)
        if result is not None:
            yield mode, result


def _folder(mode: str, args: argparse.Namespace) -> str:
    return mode if args.fraction == 1 else f"{mode}_{100 * args.fraction:g}pct"


def _print_notes(notes: Sequence[str]) -> None:
    if notes:
        print("\n".join(notes), flush=True)


def _score_text(result) -> str:
    """``mIoU 65.6 (64.0-67.0)``, or ``mIoU 65.6 ± 0.4 over 3 seeds, 5 folds``."""
    name, score = {"wf1": "wF1", "miou": "mIoU"}[result.metric], f"{100 * result.value:.1f}"
    if result.deviation is None:
        low, high = result.interval
        return f"{name} {score} ({100 * low:.1f}-{100 * high:.1f})"
    counts = {"seeds": len(result.seeds), "folds": len(result.folds)}
    over = ", ".join(f"{n} {what}" for what, n in counts.items() if n > 1)
    return f"{name} {score} ± {100 * result.deviation:.1f} over {over}"


def _record(result, path: Path, encoder, recipe) -> None:
    from maestro_scale.tracking.evaluations import record_evaluation

    if recipe.tracking.enabled:
        record_evaluation(None if result.mode == "scratch" else encoder.path, result, path)


if __name__ == "__main__":
    # Launchers put this file's folder first on sys.path, where `datasets` or `recipe` would shadow other packages.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    status = main()
    from maestro_scale.training.distributed import hard_exit

    hard_exit(status)
