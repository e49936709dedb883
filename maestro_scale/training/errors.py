"""The mistakes a user can make, which end a run with one line instead of a traceback."""

from __future__ import annotations

from maestro_scale.datasets.spec import DatasetError
from maestro_scale.interop.export import ExportError
from maestro_scale.recipe import RecipeError
from maestro_scale.shards.errors import ShardsError
from maestro_scale.stream.loader import LoaderError
from maestro_scale.stream.plan import PlanError
from maestro_scale.training.checkpoint.checkpoints import CheckpointError
from maestro_scale.training.checkpoint.mirror import MirrorError
from maestro_scale.training.guard import GuardError
from maestro_scale.training.run_dir import RunDirError
from maestro_scale.training.warmup import WarmupError

EXPECTED = (
    CheckpointError,
    DatasetError,
    ExportError,
    GuardError,
    LoaderError,
    MirrorError,
    PlanError,
    RecipeError,
    RunDirError,
    ShardsError,
    WarmupError,
)


def place(error: OSError) -> str | None:
    """One line on a file or folder that cannot be used, and what to do; None where the error names none."""
    if error.filename is None:
        return None
    return (
        f"{error.filename}: {error.strerror or error}; choose another place, or see to rights and room there"
    )
