"""Export of a training checkpoint to one safetensors file and a config.json, which torch and safetensors can load."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError
from maestro_scale.interop.sharded_state import INDEX, WEIGHT, StateReader
from maestro_scale.interop.tensors import write_tensors
from maestro_scale.model.config import ModelConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT_VERSION = 1


class ExportError(MaestroError):
    """A model or checkpoint cannot be exported, converted or loaded."""


def export_model(checkpoint: Path, out: Path, ema: bool = False) -> Path:
    """Write ``out/model.safetensors`` (fp32) and ``out/config.json`` from one committed checkpoint directory.

    ``ema``: export the moving average of the weights instead of the weights.
    """
    marker = checkpoint / "COMMIT.json"
    commit = untrusted.read_record(marker, allow_nan=True)
    datasets = commit.get("datasets")  # none in checkpoints of earlier revisions
    position = untrusted.field_of(commit, dict, "position", where=str(marker))
    seed = untrusted.field_of(commit, int, "identity", "seed", where=str(marker))
    try:
        config = ModelConfig.from_dict(untrusted.field_of(commit, dict, "identity", "model"))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ExportError(f"{marker} describes no model that this version supports ({error})") from None
    write_model(
        out,
        full_state(checkpoint / "state", "ema" if ema else WEIGHT),
        config,
        {
            "checkpoint": checkpoint.name,
            **position,
            "seed": seed,
            **({"datasets": datasets} if datasets else {}),
        },
    )
    return out


def write_model(out: Path, state: dict[str, Tensor], config: ModelConfig, trained: dict[str, Any]) -> None:
    """Write the weights and then the configuration. A kill leaves the earlier model, the new one, or none."""
    if (out / "manifest.json").exists():
        raise ExportError(f"{out} contains shards of a dataset; export to another folder")
    out.mkdir(parents=True, exist_ok=True)
    record = {"format_version": FORMAT_VERSION, "model": config.to_dict(), "trained": trained}
    # config.json last: loading starts with it, so a model that is being written cannot be loaded.
    write_tensors(state, out / (WEIGHTS + ".tmp"))
    (out / (CONFIG + ".tmp")).write_text(json.dumps(record, indent=1))
    (out / CONFIG).unlink(missing_ok=True)  # of an earlier model, whose step is not that of the new weights
    os.replace(out / (WEIGHTS + ".tmp"), out / WEIGHTS)
    os.replace(out / (CONFIG + ".tmp"), out / CONFIG)


def full_state(state_dir: Path, kind: str = WEIGHT) -> dict[str, Tensor]:
    """The fp32 weights (or ``ema``, their moving average) of a checkpoint, unsharded, on the CPU."""
    if not (state_dir / INDEX).exists():
        raise ExportError(f"{state_dir} contains no model state that this version reads")
    with StateReader(state_dir) as reader:
        if kind not in reader.kinds:
            raise ExportError(f"{state_dir} contains no {kind}: the run did not compute it (optim.ema)")
        return {name: reader.read_full(kind, name) for name in reader.shapes}


def trained_step(folder: Path) -> int | None:
    """Number of optimizer steps of an exported model; None if its config does not contain it."""
    trained = untrusted.field_of(
        untrusted.read_json(folder / CONFIG), dict, "trained", where=str(folder / CONFIG)
    )
    return trained.get("step")
