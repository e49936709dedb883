"""From a run's sharded checkpoint to one safetensors file beside its config.json, readable with torch alone."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from maestro_scale.model.config import ModelConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT_VERSION = 1


class ExportError(Exception):
    """A checkpoint cannot be exported or loaded; the message says why."""


def export_model(checkpoint: Path, out: Path) -> Path:
    """Write ``out/model.safetensors`` (fp32) and ``out/config.json`` from one committed checkpoint directory."""
    commit = json.loads((checkpoint / "COMMIT.json").read_text())
    write_model(
        out,
        full_state(checkpoint / "state"),
        ModelConfig.from_dict(commit["identity"]["model"]),
        {"checkpoint": checkpoint.name, **commit["position"], "seed": commit["identity"]["seed"]},
    )
    return out


def write_model(out: Path, state: dict[str, Tensor], config: ModelConfig, trained: dict[str, Any]) -> None:
    """Write weights, then the configuration that makes them readable, each in one go."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"format_version": FORMAT_VERSION, "model": config.to_dict(), "trained": trained}
    save_file({k: v.contiguous() for k, v in state.items()}, out / (WEIGHTS + ".tmp"))
    os.replace(out / (WEIGHTS + ".tmp"), out / WEIGHTS)
    (out / (CONFIG + ".tmp")).write_text(json.dumps(record, indent=1))
    os.replace(out / (CONFIG + ".tmp"), out / CONFIG)


def full_state(state_dir: Path) -> dict[str, Tensor]:
    """The fp32 weights behind DeepSpeed's state of any ZeRO stage, gathered on the CPU."""
    if any(state_dir.glob("*optim_states.pt")):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it narrates
            gathered = get_fp32_state_dict_from_zero_checkpoint(str(state_dir.parent), tag=state_dir.name)
        return {k: v.float() for k, v in gathered.items()}
    plain = state_dir / "mp_rank_00_model_states.pt"
    if not plain.exists():
        raise ExportError(f"{state_dir} holds no model state")
    # DeepSpeed pickles more than tensors; the file is the run's own.
    return {
        k: v.float() for k, v in torch.load(plain, map_location="cpu", weights_only=False)["module"].items()
    }


def trained_step(folder: Path) -> int | None:
    """Optimizer steps that an exported model was trained for; None where its config does not say."""
    return json.loads((folder / CONFIG).read_text())["trained"].get("step")
