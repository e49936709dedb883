"""Lists the permanent checkpoints of a run, oldest first; used by ``slurm/follow.sh``. Imports no torch.

``python -m maestro_scale.cluster.permanent RUN_DIR`` prints one path per line; exit code 2 if the recipe keeps none.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_NAME = re.compile(r"step_(\d{8,})")


def permanent_checkpoints(run_dir: Path, keep_every: int) -> list[Path]:
    """Committed checkpoints whose step is a multiple of ``keep_every``."""
    checkpoints = []
    for commit in (run_dir / "checkpoints").glob("step_*/COMMIT.json"):
        match = _NAME.fullmatch(commit.parent.name)
        if match and int(match[1]) % keep_every == 0:
            checkpoints.append((int(match[1]), commit.parent))
    return [path for _, path in sorted(checkpoints)]


def main(argv: list[str]) -> int:
    """The command line, see the module docstring."""
    from maestro_scale.recipe import RecipeError, load_recipe

    run_dir = Path(argv[0])
    try:
        keep_every = load_recipe(run_dir / "recipe.yaml").checkpoint.keep_every
    except RecipeError as error:
        print(f"error: {run_dir} is not a run directory: {error}", file=sys.stderr)
        return 2
    if not keep_every:
        print(
            f"error: {run_dir} keeps no permanent checkpoints: set checkpoint.keep_every in its recipe",
            file=sys.stderr,
        )
        return 2
    for path in permanent_checkpoints(run_dir, keep_every):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
