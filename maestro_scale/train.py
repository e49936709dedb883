"""Pretrain MAESTRO: ``deepspeed maestro_scale/train.py --recipe recipes/vitl.yaml [--run-dir DIR] [--set K=V …]``.

The same command run again resumes. Works under ``deepspeed``, ``torchrun``, ``srun`` and plain ``python``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

from maestro_scale.training.stop import StopRequest


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="YAML recipe (see recipes/)")
    parser.add_argument("--run-dir", type=Path, help="where the run lives; default runs/<name of the recipe>")
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
        "--fresh", action="store_true", help="insist on starting anew: refuse a directory with a run"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would happen, without data, and exit"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code. Expected mistakes become one line on standard error."""
    args = parse(argv)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    stop = StopRequest().install()  # what follows takes seconds
    from maestro_scale.entry import USAGE, print_error
    from maestro_scale.errors import MaestroError
    from maestro_scale.recipe import load_recipe
    from maestro_scale.secrets_filter import hide_secrets

    hide_secrets()
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.dry_run:
            from maestro_scale.training.dry_run import dry_run

            if rank == 0:
                dry_run(recipe, int(os.environ.get("WORLD_SIZE", 1)))
            return 0
        stop.run_dir = args.run_dir or Path("runs") / recipe.name
        return _pretrain(recipe, stop.run_dir, stop, args.fresh)
    except MaestroError as error:
        if rank == 0:  # every rank reads the same recipe
            print_error(str(error))
        return USAGE


def _pretrain(recipe, run_dir: Path, stop: StopRequest, fresh: bool) -> int:
    from maestro_scale.entry import USAGE, error_line, print_error
    from maestro_scale.errors import MaestroError
    from maestro_scale.recipe import RecipeError
    from maestro_scale.tracking.observers import observers_for
    from maestro_scale.tracking.run_report import REPORT, next_commands
    from maestro_scale.training.distributed import destroy_process_group, hard_exit, init_distributed
    from maestro_scale.training.guard import GuardError
    from maestro_scale.training.pretrain import pretrain
    from maestro_scale.training.run_dir import write_outcome
    from maestro_scale.training.watchdog import EXIT_HANG, Watchdog

    timeout_s = recipe.train.hang_timeout_s
    world = init_distributed(max(600.0, 2 * timeout_s))  # the watchdog speaks first
    watch = Watchdog(world, timeout_s, run_dir).start()
    try:
        observers = observers_for(recipe) if world.is_main else []
        outcome = pretrain(recipe, run_dir, world, observers, watch, stop, fresh)
    except (MaestroError, OSError) as error:
        if (line := error_line(error)) is None:
            raise
        if world.is_main:
            print_error(line)
        elif not isinstance(error, (RecipeError, GuardError)):  # those are the same on all ranks
            print_error(line, world.rank)
        hard_exit(USAGE)  # the other ranks may be waiting for this one: the launcher ends them
    except RuntimeError:
        if world.size > 1 and (missing := watch.missing()):
            traceback.print_exc()
            print(f"error (rank {world.rank}): {missing}", file=sys.stderr, flush=True)
            os._exit(EXIT_HANG)
        raise
    watch.stop()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # on the way out; a repeated request must not kill it
    if world.is_main:
        write_outcome(run_dir, outcome.reason, outcome.why, outcome.position.step)
        if outcome.reason == "stopped":
            print(
                f"stopped by {outcome.why} after step {outcome.position.step}, resume with the same command"
            )
        else:
            print(f"done: {outcome.position.step} steps, {outcome.position.samples} samples, in {run_dir}")
            print(f"losses and speed are in {run_dir / REPORT}; next:")
            print("\n".join(f"    {command}" for command in next_commands(run_dir, outcome.reason)))
    destroy_process_group()
    return 0


if __name__ == "__main__":
    # Launchers put this file's folder first on sys.path, where `datasets` or `recipe` would shadow other packages.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    status = main()
    from maestro_scale.training.distributed import hard_exit

    hard_exit(status)
