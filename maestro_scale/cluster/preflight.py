"""What the batch script of a training knows before any task starts; used by ``slurm/pretrain_multinode.sh``.

Imports no torch: it runs while all nodes of the job wait.

``python -m maestro_scale.cluster.preflight run-dir NUM_RANKS --recipe …``: checks recipe, data and GPUs, and prints the
run directory; exit code 2 if the recipe is invalid, 4 if data is missing, 5 if the node has GPUs and the job has none.
``… show NUM_RANKS --recipe …``: the same checks, as lines for a user (``MAESTRO_CHECK=1``).
``… folders NUM_RANKS --recipe …``: folders that a container must see, one per line.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

from maestro_scale.cluster.checks import data_problems
from maestro_scale.errors import MaestroError
from maestro_scale.recipe import Recipe, check_world, load_recipe
from maestro_scale.remote.reader import local_folder
from maestro_scale.shards.errors import ShardsError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.training.binding import gpu_sign

BAD_RECIPE, NO_DATA, NO_GPUS = 2, 4, 5


class PreflightError(MaestroError):
    """The job cannot do what it was submitted for. ``code``: exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def run_dir_of(args: Namespace, recipe: Recipe) -> Path:
    """The run directory, as the trainer chooses it."""
    path: Path = args.run_dir or Path("runs") / recipe.name
    return path.absolute()


def check_data(recipe: Recipe) -> None:
    """PreflightError where shards of the mixture are missing: without this, every node would be called bad."""
    mixture = recipe.data.mixture
    if problems := data_problems([e.shards for e in mixture], [e.split for e in mixture]):
        raise PreflightError(NO_DATA, "; ".join(problem.removeprefix("data: ") for problem in problems))


def check_gpus(recipe: Recipe, env: Mapping[str, str]) -> None:
    """PreflightError where this node has GPUs and the job asked for none: it would train on its CPUs, or on one GPU.

    ``MAESTRO_NODE_GRES``: the GPUs of the node in SLURM's words, e.g. ``gpu:8``.
    """
    if recipe.train.device == "cpu" or env.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0"):
        return
    gres = env.get("MAESTRO_NODE_GRES", "")
    sign = gres if gres.startswith("gpu") else gpu_sign(env)
    if sign:
        raise PreflightError(
            NO_GPUS,
            f"this node has GPUs ({sign}), and the job asks for none: sbatch --gpus-per-node=N …, or "
            "--set train.device=cpu to train on the CPUs",
        )


def folders(args: Namespace, recipe: Recipe) -> Iterator[Path]:
    """Folders on this machine that the tasks read and write; those of a container must be mounted.

    The parent of the run directory: MLflow's database is beside the runs.
    """
    yield run_dir_of(args, recipe).parent
    places = [*(e.shards for e in recipe.data.mixture), recipe.checkpoint.mirror, recipe.model.init_from]
    for place in filter(None, places):
        if (folder := local_folder(str(place))) is not None:
            yield folder.absolute()


def data_lines(recipe: Recipe) -> Iterator[str]:
    """A line per dataset of the mixture, also where it is missing."""
    for entry in recipe.data.mixture:
        where = f"{entry.dataset}, {', '.join(entry.split)}"
        try:
            shards = Manifest.load(entry.shards).shards_of(entry.split)
        except ShardsError as error:
            yield f"data      {where}: MISSING: {error}"
            continue
        samples, size = sum(s.samples for s in shards), sum(s.bytes for s in shards) / 1e9
        yield f"data      {where}: {samples} samples in {len(shards)} shards, {size:.1f} GB, at {entry.shards}"


def main(argv: list[str]) -> int:
    """The command line, see the module docstring."""
    from maestro_scale.train import parse

    what, num_ranks, *rest = argv
    args = parse(rest)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        check_world(recipe, int(num_ranks))
        if what == "folders":
            print("\n".join(map(str, dict.fromkeys(folders(args, recipe)))))
            return 0
        if what == "show":
            print(f"recipe    {args.recipe}: {recipe.name}, {num_ranks} ranks share lanes and batch")
            print(f"run       {run_dir_of(args, recipe)}")
            print("\n".join(data_lines(recipe)))
        check_gpus(recipe, os.environ)
        check_data(recipe)
    except MaestroError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code if isinstance(error, PreflightError) else BAD_RECIPE
    if what == "run-dir":
        print(run_dir_of(args, recipe))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
