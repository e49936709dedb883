"""Evaluate an encoder: ``deepspeed maestro_scale/evaluate.py --recipe R --checkpoint C --mode knn --out DIR``.

Writes ``<out>/<mode>/results.json``; with ``--fraction 0.1``, ``<out>/<mode>_10pct/results.json``. With several seeds
or folds that is the mean, and the results of each run are in ``fold_<k>/seed_<s>/`` below it. The same command resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from maestro_scale.entry import parse_words

if TYPE_CHECKING:
    from maestro_scale.evaluation.results import EvalResult
    from maestro_scale.evaluation.run import EvalOptions
    from maestro_scale.recipe import Recipe
    from maestro_scale.training.observer import Observer


def parse(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> argparse.Namespace:
    """The command line. ``prog``: name of the command in its help."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--recipe",
        required=True,
        help="YAML file whose first dataset is the benchmark, or the name of a recipe that comes with the package",
    )
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument(
        "--checkpoint",
        help="a run directory (of a finetuning too), one of its checkpoints, or an exported model; {fold} in it "
        "becomes the fold's number",
    )
    encoder.add_argument(
        "--baseline",
        metavar="NAME",
        help="instead of a checkpoint: statistics (of the channels), untrained (the recipe's model; also: random), "
        "image:WEIGHTS (an image encoder of transformers, e.g. image:facebook/dinov2-base), presto:WEIGHTS, "
        "galileo:WEIGHTS, torchgeo:MODEL, terratorch:MODEL, python:pkg.module:Class (your own encoder, see "
        "docs/evaluation.md), or oracle (on synthetic data only: a predictor that knows how the scenes are generated; "
        "it has no modes). Options follow after commas: NAME:ARGUMENT,key=value",
    )
    parser.add_argument(
        "--mode",
        choices=("knn", "probe", "attentive", "finetune", "scratch", "test"),
        action="append",
        help="repeatable; default: evaluation.modes of the recipe. probe: linear; attentive: the head of a finetuning "
        "on the frozen encoder; finetune and scratch train with the recipe's optim and train sections; test: a "
        "finetuned model (the directory of a finetuning, or its export) on the test split, without training",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--target", help="what to predict; default: the dataset's first target")
    parser.add_argument(
        "--fraction",
        type=float,
        default=1.0,
        help="fraction of the training labels, e.g. 0.1: the list of the release where it was sharded (split "
        "train_filtered_10), else a stratified sample; a smaller fraction is a subset of a larger one",
    )
    parser.add_argument(
        "--split",
        dest="splits",
        metavar="ROLE=SPLITS",
        nargs="+",
        action="extend",
        default=[],
        help="the splits in shards for train, val and test, e.g. train=fold_2,fold_3,fold_4 val=fold_5 test=fold_1",
    )
    parser.add_argument(
        "--folds",
        help="folds of cross-validation, e.g. 1,2,3, or all: fold k is a rotation of the splits fold_1, fold_2, … "
        "(PASTIS-HD) or split_k_train, split_k_val, split_k_test (FLAIR-HUB); mean and standard deviation",
    )
    parser.add_argument(
        "--seeds",
        type=_parse_numbers,
        help="one run per seed, e.g. 0,1,2: mean and standard deviation (default: the recipe's seed)",
    )
    parser.add_argument(
        "--maps",
        action="store_true",
        help="write the predicted maps of the test tiles as GeoTIFF, to maps/ next to the results",
    )
    parser.add_argument(
        "--features",
        type=Path,
        help="folder of cached features, reused by other modes and later runs; all ranks must see it "
        "(default: OUT/features)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override a key of the recipe",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parse_words(parser, argv)


def main(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    """Run the command; returns the exit code. Expected errors become one line on standard error."""
    args = parse(argv, prog)
    # Imported only now: they take seconds, which --help and a mistyped option need not wait for.
    from maestro_scale.launcher_death import watch_launcher
    from maestro_scale.training.stop import StopRequest

    stop = StopRequest()
    watch_launcher(stop)
    from maestro_scale.entry import launched_rank, run_command
    from maestro_scale.evaluation.run import run_evaluation
    from maestro_scale.secrets_filter import hide_secrets
    from maestro_scale.tracking.terminal import progress

    hide_secrets()
    return run_command(
        lambda: run_evaluation(_options(args), progress, _record, _observers, stop), launched_rank()
    )


def _options(args: argparse.Namespace) -> EvalOptions:
    """The command line as options; MaestroError where a value cannot be parsed."""
    from maestro_scale.evaluation.run import EvalOptions

    return EvalOptions(
        recipe=args.recipe,
        out=args.out,
        checkpoint=args.checkpoint,
        baseline=args.baseline,
        modes=args.mode or (),
        target=args.target,
        fraction=args.fraction,
        splits=_parse_splits(args.splits),
        folds=_parse_folds(args.folds),
        seeds=args.seeds or (),
        maps=args.maps,
        features=args.features,
        overrides=args.overrides,
    )


def _parse_splits(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """``["train=a,b"]`` as ``{"train": ("a", "b")}``."""
    from maestro_scale.errors import MaestroError

    splits = {}
    for text in texts:
        role, _, names = text.partition("=")
        if role not in ("train", "val", "test") or not all(names.split(",")):
            raise MaestroError(f"--split {text}: expected train=NAME,NAME…, val=… or test=…")
        if role in splits:
            raise MaestroError(f"--split {text}: {role} is given twice; separate its splits by commas")
        splits[role] = tuple(names.split(","))
    return splits


def _parse_folds(text: str | None) -> tuple[int, ...] | Literal["all"]:
    """``"1,2,3"`` as numbers; ``all``; empty for None."""
    from maestro_scale.errors import MaestroError

    if text is None:
        return ()
    if text == "all":
        return "all"
    try:
        return _parse_numbers(text)
    except argparse.ArgumentTypeError as error:
        raise MaestroError(f"--folds {error}, or all") from None


def _parse_numbers(text: str) -> tuple[int, ...]:
    """``"0,1,2"`` as numbers, each once."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2") from None
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers start at 0")
    return numbers


def _observers(recipe: Recipe) -> Sequence[Observer]:
    """Follow a finetuning in MLflow; its progress on the terminal is shown by ``progress``."""
    from maestro_scale.tracking.observers import TrackingObserver

    return [TrackingObserver(recipe)]


def _record(checkpoint: Path | None, result: EvalResult, path: Path) -> None:
    """Store a result in MLflow."""
    from maestro_scale.tracking.evaluations import record_evaluation  # MLflow takes seconds to import

    record_evaluation(checkpoint, result, path)


if __name__ == "__main__":
    # Launchers put this file's folder first on sys.path, where `datasets` or `recipe` would shadow other packages.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    status = main()
    from maestro_scale.training.distributed import hard_exit

    hard_exit(status)
