"""Conversion of exported models to Lightning checkpoints of IGNF/MAESTRO, without loss."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch

from maestro_scale.errors import shorten
from maestro_scale.interop.convert import OWN, PREFIXES
from maestro_scale.interop.export import FORMAT_VERSION, ExportError
from maestro_scale.interop.pretrained import read_model
from maestro_scale.interop.reference_keys import to_reference
from maestro_scale.interop.sources import ModelSource
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.sizes import SIZES, Size

_SIZE_NAMES = {"tiny": "tiny", "small": "small", "base": "medium", "large": "large"}
_LOSSES = {("patch_group", "l1"): "l1_norm", ("patch_group", "l2"): "l2_norm"}


def convert_to_reference(folder: Path, out: Path) -> list[str]:
    """Write an exported model as a Lightning checkpoint with reference names and shapes, atomically.

    ``SSLModule.load_from_checkpoint(out, strict=False, datasets=…)`` of IGNF/MAESTRO loads it: all arguments of its
    constructor but ``datasets`` are hyper-parameters (``maestro/train/model.py`` of 6a30075), and the weights are also
    those of its moving average. The configuration is stored too, so that converting back needs no options.

    Returns lines for the user on what the authors' code cannot do with it.
    """
    source = ModelSource(folder)
    record = source.read_config()
    trained = record.get("trained")
    counts = {k: v for k, v in trained.items() if type(v) is int} if isinstance(trained, dict) else {}
    config, weights = read_model(source)
    state = to_reference(weights, config)
    content = {
        "epoch": counts.get("epoch", 0),
        "global_step": counts.get("step", 0),
        "pytorch-lightning_version": "2.0.0",  # the oldest that the reference accepts; Lightning migrates from it
        # Both names share their bytes in the file.
        "state_dict": {f"{prefix}{k}": v for prefix in PREFIXES.values() for k, v in state.items()},
        "hyper_parameters": {
            # A stand-in for their MaskConfig, whose package is not needed to read this one; only its attributes are
            # used, and in pretraining alone. The values are those of maestro/conf/mask.py.
            "mask": argparse.Namespace(
                mask_ratio=0.75,
                mask_scale=0.0,
                mask_mod=0.25,
                mask_bands=None,
                mask_dates=0.25,
                mask_loc=0.25,
            ),
            "interpolate": "nearest",
            "fusion_mode": config.fusion,
            "inter_depth": config.inter_depth,
            "model": "mae",
            "model_size": _SIZE_NAMES.get(_ours(config.size)),
            "type_head": "attentive" if config.pool == "attentive" else "linear",
            "loss": _LOSSES.get((config.target, config.loss), config.loss),
            "use_date_enc": True,
            "use_ema": True,
        },
        OWN: {
            "format_version": FORMAT_VERSION,
            "model": config.to_dict(),
            **({"finetuned": record["finetuned"]} if "finetuned" in record else {}),
        },
    }
    if out.is_dir():
        raise ExportError(f"{out} is a folder: give a file name, such as {out / 'model.ckpt'}")
    temporary = out.with_name(f"{out.name}.{uuid.uuid4().hex}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(content, temporary)
        os.replace(temporary, out)
    except RuntimeError as error:  # how torch reports a full disk
        raise ExportError(
            f"{out}: cannot be written ({shorten(str(error))}); free space on the disk"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return list(_limits(config, "finetuned" in record))


def _limits(config: ModelConfig, is_finetuned: bool) -> Iterator[str]:
    """What the authors' code cannot do with a model."""
    if _ours(config.size) not in _SIZE_NAMES:
        yield f"the authors' code has the sizes {', '.join(_SIZE_NAMES.values())} only: it cannot build this one"
    if config.norm != "group":
        yield f"the authors' code normalises patch embeddings over a date, this model per {config.norm}: tokens differ"
    if is_finetuned:
        yield "the model was finetuned and has no decoder of pixels: the authors' code begins with a random one"
    if numbers := [t.name for t in config.heads if t.kind == "regression"]:
        yield f"the authors' code has no regression: it ignores the head {', '.join(numbers)}"
    if config.decoder != "attentive":
        yield f"the authors' code has no {config.decoder} decoder: it ignores this head"


def _ours(size: Size) -> str:
    return next((name for name, known in SIZES.items() if known == size), "")
