"""Pretrain MAESTRO: ``deepspeed maestro_scale/train.py --recipe recipes/vitl.yaml [--run-dir DIR] [--set K=V …]``.

The same command run again resumes. Works under ``deepspeed``, ``torchrun``, ``srun``, plain ``python``, and as
``maestro-scale train``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maestro_scale.entry import parse_words
from maestro_scale.launcher_death import watch_launcher
from maestro_scale.training.stop import StopRequest


def parse(argv: Sequence[str] | None = None, prog: str = "train.py") -> argparse.Namespace:
    """The command line. ``prog``: name of the command in its help."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--recipe",
        required=True,
        help="YAML file, or the name of a recipe that comes with the package, e.g. vitl",
    )
    parser.add_argument("--run-dir", type=Path, help="run directory; default runs/<name of the recipe>")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change the recipe, e.g. --set train.steps=100 'data.mixture[0].shards=s3://bucket/treesatai_ts'",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start a new run: refuse a directory that contains one"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, tokens, FLOPs and memory, without data, and exit",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parse_words(parser, argv)


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Run the command; returns the exit code. Expected errors become one line on standard error."""
    args = parse(argv, prog)
    stop = StopRequest().install()  # before the imports, which take seconds
    watch_launcher(stop)
    from maestro_scale.entry import launched_rank, run_command
    from maestro_scale.secrets_filter import hide_secrets

    hide_secrets()
    rank = launched_rank()
    return run_command(lambda: _run(args, stop, rank), rank)


def _run(args: argparse.Namespace, stop: StopRequest, rank: int) -> None:
    from maestro_scale.recipe import check_world, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        from maestro_scale.training.dry_run import dry_run

        if rank == 0:
            dry_run(recipe, int(os.environ.get("WORLD_SIZE", 1)))
        return
    from maestro_scale.evaluation.in_loop import evaluation_hooks
    from maestro_scale.tracking.observers import observers_for
    from maestro_scale.tracking.run_report import closing_message
    from maestro_scale.training.binding import Launch
    from maestro_scale.training.run import run_pretraining

    check_world(recipe, Launch.from_env(os.environ).size)  # before ranks wait for each other
    stop.run_dir = args.run_dir or Path("runs") / recipe.name
    run_pretraining(recipe, stop.run_dir, stop, args.fresh, observers_for, evaluation_hooks, closing_message)


if __name__ == "__main__":
    # Launchers put this file's folder first on sys.path, where `datasets` or `recipe` would shadow other packages.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    status = main()
    from maestro_scale.training.distributed import hard_exit

    hard_exit(status)
