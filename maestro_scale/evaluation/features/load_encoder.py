"""Load a pretrained or finetuned encoder from a run directory, one of its checkpoints, or an exported model."""

from __future__ import annotations

from pathlib import Path

from maestro_scale.errors import did_you_mean
from maestro_scale.interop.export import (
    CONFIG,
    ExportError,
    export_finetuned,
    export_model,
    is_finetuning,
    trained_step,
)
from maestro_scale.interop.pretrained import load_model, load_source
from maestro_scale.interop.published import PUBLISHED
from maestro_scale.interop.sources import ModelSource, is_local
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.temporary import temporary_folder
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.folder import newest


def load_encoder(path: Path) -> tuple[Maestro, int | None]:
    """(model, optimizer steps it was trained for). ``path``: also an address or a name for ``load_model``. ExportError
    or CheckpointError if it holds no model."""
    if not is_local(path):
        source = ModelSource(path)
        trained = source.read_config().get("trained")
        step = trained.get("step") if isinstance(trained, dict) else None
        return load_source(source), step if type(step) is int else None
    if (path / CONFIG).exists():
        return load_model(path), trained_step(path)
    if (path / "checkpoints").is_dir():
        with temporary_folder() as folder:
            exported = export_run(path, folder)
            return load_model(exported), trained_step(exported)
    if not (path / commit.MARKER).exists():
        raise ExportError(
            f"{path} is neither a run directory, nor a checkpoint, nor an exported model{_hint(path)}"
        )
    if problem := commit.problem(path, hashes=True):
        raise ExportError(f"{path}: {problem}; use another checkpoint")
    # Checkpoints are sharded by rank and ZeRO stage: the export is the one place that puts weights together.
    with temporary_folder() as folder:
        exported = export_model(path, folder)
        return load_model(exported), trained_step(exported)


def _hint(path: Path) -> str:
    """What is at a path that holds no model, and where one is."""
    if not path.exists():
        name = did_you_mean(str(path), PUBLISHED).partition(" (there are")[0]
        return f": it does not exist{'' if path.is_absolute() else f' in {Path.cwd()}'}{name}"
    if (path / "manifest.json").exists():
        return ": it holds shards of a dataset"
    if path.is_file():
        holds_model = (path.parent / CONFIG).exists() or (path.parent / "checkpoints").is_dir()
        return f": it is a file{f'; give its folder, {path.parent}' if holds_model else ''}"
    if path.name == "checkpoints":
        return f"; give the run directory, {path.parent}"
    inside = [p.name for p in sorted(path.iterdir()) if (p / CONFIG).exists() or (p / "checkpoints").is_dir()]
    return f"; it contains {', '.join(inside[:10])}: give one of them" if inside else ""


def export_run(run_dir: Path, out: Path, ema: bool = False) -> Path:
    """Export a run to the folder ``out``: its newest checkpoint, or, of a finetuning, the weights that were tested with
    head and view. ``ema``: the average of a pretraining's weights; the tested weights of a finetuning are one already.

    ExportError or CheckpointError where it has nothing to export."""
    if is_finetuning(run_dir):
        return export_finetuned(run_dir, out)
    return export_model(newest(run_dir), out, ema)
