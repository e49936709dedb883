"""Export of a training checkpoint to one safetensors file and a config.json, which torch and safetensors can load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError, shorten
from maestro_scale.interop.sharded_state import INDEX, WEIGHT, StateReader
from maestro_scale.interop.tensors import file_sha256, write_tensors
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.output_folder import check_output
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import check_spec
from maestro_scale.shards.format.serialization import to_builtins

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FINETUNED = "finetuned.json"  # in the directory of a finetuning that has ended: what an export of it contains
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


@dataclass(frozen=True)
class FinetunedRun:
    """Content of ``finetuned.json``. ``weights``: of the best validation, a file in the run's directory, and their
    ``sha256``; ``model``: the configuration of the network; ``trained``: as in config.json of an export."""

    weights: str
    sha256: str
    model: ModelConfig
    finetuned: Finetuned
    trained: Mapping[str, Any]


def write_finetuned(run_dir: Path, run: FinetunedRun) -> None:
    """Write ``run_dir/finetuned.json``."""
    record = {
        "format_version": FORMAT_VERSION,
        "weights": run.weights,
        "sha256": run.sha256,
        "model": run.model.to_dict(),
        "finetuned": to_builtins(run.finetuned),
        "trained": dict(run.trained),
    }
    path = run_dir / FINETUNED
    path.with_suffix(".tmp").write_text(json.dumps(record, indent=1))
    os.replace(path.with_suffix(".tmp"), path)


def read_finetuned(run_dir: Path) -> FinetunedRun:
    """The record of a finetuning that has ended. ExportError if it is damaged or not supported."""
    path = run_dir / FINETUNED
    try:
        record = untrusted.read_record(path)
        version = record.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise untrusted.InputError(f"has format {version}, this version reads {FORMAT_VERSION}")
        run = untrusted.from_builtins(FinetunedRun, record)
        check_spec(run.finetuned.spec)
    except (ValueError, TypeError, ArithmeticError, ManifestError) as error:
        raise ExportError(f"{path}: {error}; evaluate with the same command again to write it") from None
    if not _BEST.fullmatch(run.weights):
        raise ExportError(f"{path}: {shorten(run.weights)} is not the file of the best weights")
    return run


_BEST = re.compile(r"best/step_\d{8}\.safetensors")


def is_finetuning(run_dir: Path) -> bool:
    """Whether it is the directory of a finetuning. ExportError where that has nothing to export yet."""
    if (run_dir / FINETUNED).exists():
        return True
    if (run_dir / "validation.jsonl").exists():
        raise ExportError(
            f"{run_dir} is a finetuning that has not ended, or one of an earlier revision or of a baseline: repeat the "
            "command that evaluated it, which completes it"
        )
    return False


def export_finetuned(run_dir: Path, out: Path) -> Path:
    """Export a finetuning: the weights that were tested, with head, classes, units, metric and view."""
    run = read_finetuned(run_dir)
    path = run_dir / run.weights
    try:
        if file_sha256(path) != run.sha256:
            raise untrusted.InputError("is not the file that was tested")
        state = untrusted.load_tensors(path)
    except (OSError, untrusted.InputError) as error:
        raise ExportError(f"{path}: {error}; remove {run_dir} and finetune again") from None
    write_model(out, state, run.model, dict(run.trained), run.finetuned)
    return out


def write_model(
    out: Path,
    state: dict[str, Tensor],
    config: ModelConfig,
    trained: dict[str, Any],
    finetuned: Finetuned | None = None,
) -> None:
    """Write the weights and then the configuration. A kill leaves the earlier model, the new one, or none.

    ``finetuned``: of a finetuned model, which has no decoder of pixels.
    """
    check_output(out, "an exported model")
    out.mkdir(parents=True, exist_ok=True)
    record = {"format_version": FORMAT_VERSION, "model": config.to_dict(), "trained": trained}
    if finetuned is not None:
        record["finetuned"] = to_builtins(finetuned)
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
