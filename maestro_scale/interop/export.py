"""From a run's sharded checkpoint to one safetensors file beside its config.json, readable with torch alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from maestro_scale.errors import MaestroError
from maestro_scale.interop.sharded_state import INDEX, WEIGHT, StateReader
from maestro_scale.interop.tensors import write_tensors
from maestro_scale.model.config import ModelConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT_VERSION = 1


class ExportError(MaestroError):
    """A checkpoint cannot be exported or loaded; the message says why."""


def export_model(checkpoint: Path, out: Path, ema: bool = False) -> Path:
    """Write ``out/model.safetensors`` (fp32) and ``out/config.json`` from one committed checkpoint directory.

    ``ema``: the moving average of the weights instead of the last ones.
    """
    commit = json.loads((checkpoint / "COMMIT.json").read_text())
    write_model(
        out,
        full_state(checkpoint / "state", "ema" if ema else WEIGHT),
        ModelConfig.from_dict(commit["identity"]["model"]),
        {"checkpoint": checkpoint.name, **commit["position"], "seed": commit["identity"]["seed"]},
    )
    return out


def write_model(out: Path, state: dict[str, Tensor], config: ModelConfig, trained: dict[str, Any]) -> None:
    """Write weights, then the configuration that makes them readable, each in one go."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"format_version": FORMAT_VERSION, "model": config.to_dict(), "trained": trained}
    write_tensors(state, out / (WEIGHTS + ".tmp"))
    os.replace(out / (WEIGHTS + ".tmp"), out / WEIGHTS)
    (out / (CONFIG + ".tmp")).write_text(json.dumps(record, indent=1))
    os.replace(out / (CONFIG + ".tmp"), out / CONFIG)


def full_state(state_dir: Path, kind: str = WEIGHT) -> dict[str, Tensor]:
    """The fp32 weights (or ``ema``, their moving average) of a checkpoint, whole, on the CPU."""
    if not (state_dir / INDEX).exists():
        raise ExportError(f"{state_dir} holds no model state that this version reads")
    with StateReader(state_dir) as reader:
        if kind not in reader.kinds:
            raise ExportError(f"{state_dir} holds no {kind}: the run was not asked for it (optim.ema)")
        return {name: reader.read_full(kind, name) for name in reader.shapes}


def trained_step(folder: Path) -> int | None:
    """Optimizer steps that an exported model was trained for; None where its config does not say."""
    return json.loads((folder / CONFIG).read_text())["trained"].get("step")
