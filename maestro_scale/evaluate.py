"""Score a checkpoint: ``deepspeed maestro_scale/evaluate.py --recipe R --checkpoint C --mode knn --out DIR``.

Writes ``<out>/<mode>/results.json``.
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
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a run directory, one of its checkpoints, or an exported model",
    )
    parser.add_argument("--mode", choices=("knn", "probe"), action="append", help="default: evaluation.modes")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
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
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) > 0:
        return 0  # frozen features of a benchmark are few enough for one rank
    from maestro_scale.evaluation.results import ResultsError
    from maestro_scale.training.errors import EXPECTED

    try:
        _evaluate(args)
    except (*EXPECTED, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    from maestro_scale.evaluation.checkpoints import open_model
    from maestro_scale.evaluation.frozen import Provenance, evaluate_frozen
    from maestro_scale.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    model, step = open_model(args.checkpoint)
    results = evaluate_frozen(
        model,
        recipe.data.mixture[0].shards,
        Path(recipe.data.cache_dir),
        modes=args.mode or recipe.evaluation.modes,
        provenance=Provenance(step, recipe.seed, recipe.model_dump(mode="json")),
        workers=recipe.data.workers,
        cache_bytes=int(recipe.data.cache_gib * 2**30),
    )
    for result in results:
        path = args.out / result.mode / "results.json"
        result.write(path)
        low, high = result.interval
        print(f"{result.mode}: wF1 {100 * result.value:.1f} ({100 * low:.1f}-{100 * high:.1f}), {path}")


if __name__ == "__main__":
    # Launchers put this file's folder first on sys.path, where `datasets` or `recipe` would shadow other packages.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
