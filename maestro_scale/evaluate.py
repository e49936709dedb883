"""Score a checkpoint: ``deepspeed maestro_scale/evaluate.py --recipe R --checkpoint C --mode knn --out DIR``.

Writes ``<out>/<mode>/results.json``; with ``--fraction 0.1``, ``<out>/<mode>_10pct/results.json``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="YAML recipe whose first dataset is the benchmark")
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument(
        "--checkpoint", type=Path, help="a run directory, one of its checkpoints, or an exported model"
    )
    encoder.add_argument(
        "--baseline",
        metavar="NAME",
        help="instead: statistics (of the channels), random (the recipe's model, untrained), or image:WEIGHTS "
        "(an image encoder that transformers can load, e.g. image:facebook/dinov2-base)",
    )
    parser.add_argument(
        "--mode",
        choices=("knn", "probe", "finetune", "scratch"),
        action="append",
        help="default: evaluation.modes; finetune and scratch train by the recipe's optim and train, and continue "
        "where they were interrupted",
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
    from maestro_scale.evaluation.results import ResultsError
    from maestro_scale.secrets_filter import hide_secrets
    from maestro_scale.training.errors import EXPECTED

    hide_secrets()
    try:
        _evaluate(args)
    except (*EXPECTED, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


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


def _evaluate(args: argparse.Namespace) -> None:
    from maestro_scale.evaluation.finetune import MODES, finetune
    from maestro_scale.evaluation.frozen import Benchmark, Provenance, evaluate_frozen
    from maestro_scale.recipe import load_recipe
    from maestro_scale.training.distributed import join, leave

    recipe = load_recipe(args.recipe, args.overrides)
    modes = tuple(dict.fromkeys(args.mode or recipe.evaluation.modes))
    frozen, trained = [m for m in modes if m not in MODES], [m for m in modes if m in MODES]
    encoder = _Encoder(args, recipe)
    ranks = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    world = join() if ranks > 1 or trained else None
    is_main = world is None or world.is_main
    entry = recipe.data.mixture[0]
    benchmark = Benchmark(
        shards=entry.shards,
        cache_dir=Path(recipe.data.cache_dir),
        features_dir=args.features or args.out / "features",
        cache_bytes=int(recipe.data.cache_gib * 2**30),
        crop_m=entry.crop_m,
        target=args.target,
        fraction=args.fraction,
        splits=_splits(args.splits),
    )
    plain = recipe.model_dump(mode="json")
    named = args.baseline or str(args.checkpoint)
    provenance = Provenance(encoder.step, recipe.seed, plain, named, encoder.trained_on)
    part = "" if args.fraction == 1 else f"_{100 * args.fraction:g}pct"
    if frozen:
        model = encoder.seen(learns=False, tells=is_main)
        for result in evaluate_frozen(model, benchmark, frozen, provenance, recipe.data.workers, world):
            _keep(result, args.out / f"{result.mode}{part}", args, recipe)
    for mode in trained:
        model = encoder.seen(learns=True, tells=is_main and mode == "finetune")
        origin = provenance if mode == "finetune" else Provenance(0, recipe.seed, plain)
        folder = args.out / f"{mode}{part}"
        result = finetune(model, benchmark, recipe, mode, folder, world, origin)
        if result is not None:
            _keep(result, folder, args, recipe)
        elif is_main:
            print(f"{mode}: stopped; the same command continues it", flush=True)
    if world is not None:
        leave()


class _Encoder:
    """What is evaluated. ``step``: that it was trained for; ``trained_on``: datasets."""

    def __init__(self, args: argparse.Namespace, recipe) -> None:
        from maestro_scale.evaluation.baselines import baseline
        from maestro_scale.evaluation.checkpoints import open_model
        from maestro_scale.model.config import DatasetView
        from maestro_scale.recipe import resolve_sensors
        from maestro_scale.shards.manifest import Manifest

        entry = recipe.data.mixture[0]
        spec = Manifest.load(entry.shards).spec
        crop_m = entry.crop_m or spec.crop_m
        sensors = resolve_sensors(spec, entry)
        self._view = DatasetView(spec.name, sensors, spec.pos_grid, spec.ref_sensor, crop_m)
        self._baseline = args.baseline
        self.step: int | None = 0
        self.trained_on: tuple[str, ...] = ()
        if args.baseline:
            self._model = baseline(args.baseline, recipe, spec, self._view)
            return
        self._model, self.step = open_model(args.checkpoint)
        if self.step != 0:
            self.trained_on = tuple(v.dataset for v in self._model.config.views)

    def seen(self, learns: bool, tells: bool):
        """The encoder as it sees the benchmark; ``learns``: and is trained on it."""
        from maestro_scale.evaluation.adopt import adopt
        from maestro_scale.evaluation.results import ResultsError
        from maestro_scale.model.maestro import Maestro

        if self._baseline:
            if learns and not isinstance(self._model, Maestro):
                raise ResultsError(
                    f"--baseline {self._baseline} is not trained here: use --mode knn or probe"
                )
            return self._model
        model, notes = adopt(self._model, self._view, learns)
        if tells and notes:
            print("\n".join(notes), flush=True)
        return model


def _keep(result, folder: Path, args: argparse.Namespace, recipe) -> None:
    from maestro_scale.tracking.evaluations import record_evaluation

    path = folder / "results.json"
    result.write(path)
    if args.checkpoint and recipe.tracking.enabled and result.mode != "scratch":
        record_evaluation(args.checkpoint, result, path)
    low, high = result.interval
    name = {"wf1": "wF1", "miou": "mIoU"}[result.metric]
    scores = f"{100 * result.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    print(f"{result.mode}: {name} {scores}, {path}", flush=True)


if __name__ == "__main__":
    # Launchers put this file's folder first on sys.path, where `datasets` or `recipe` would shadow other packages.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
