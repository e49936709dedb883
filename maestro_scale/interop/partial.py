"""Initialisation from a pretrained model of other sensors, dates or patch sizes: loads the parameters that fit.

A parameter is loaded where the other model has one of the same name and shape; a mask token also from a sensor that
shares the patch embedding. Patch embeddings and their inverses are resized to another patch size so that they give on
resized patches what they gave before (the pseudo-inverse of bilinear resizing: FlexiViT, arXiv 2212.08013, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.interop.export import ExportError
from maestro_scale.interop.pretrained import read_model
from maestro_scale.interop.sources import ModelSource
from maestro_scale.interop.transfer import TransferredPart, TransferStatus, summarize_transfer
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro


@torch.no_grad()
def start_from(model: Maestro, url: str) -> tuple[TransferredPart, ...]:
    """Load into ``model`` what fits of the exported model at ``url``; returns the status of every part.

    ExportError where there is no such model, its encoder has another width, or nothing of it fits.
    """
    config, state = read_model(ModelSource(url))
    theirs, ours = config.size.width, model.config.size.width
    if theirs != ours:
        # A few parameters have the same shape at any width (biases of pixels); loading only those would go unnoticed.
        raise ExportError(
            f"model.init_from={url}: its encoder has width {theirs}, this model's has width {ours}, so its weights do "
            "not fit: start from a model of the same width, or change model.size or model.width"
        )
    statuses: list[tuple[str, TransferStatus, int, str]] = []
    used = set()
    for name, p in model.named_parameters():
        source = _counterpart(name, model.config, config, state)
        found = state.get(source)
        status: TransferStatus = "initialised"
        why = "not in the other model"
        if found is not None:
            resized = _fit(name, found, p, model.config, config)
            why = f"{tuple(found.shape)} there, {tuple(p.shape)} here"
            if resized is not None:
                p.copy_(resized)
                used.add(source)
                same = found.shape == p.shape
                status, why = ("loaded", "") if same else ("resized", "another patch size")
        statuses.append((name, status, p.numel(), why))
    statuses += [
        (name, "unused", t.numel(), "no place for it here") for name, t in state.items() if name not in used
    ]
    parts = summarize_transfer(statuses)
    if not used:
        raise ExportError(
            f"model.init_from={url}: none of its parameters has the name and shape of one of this model"
        )
    return parts


def _counterpart(name: str, ours: ModelConfig, theirs: ModelConfig, state: dict[str, Tensor]) -> str:
    """The name in ``state`` of the parameter to load."""
    kind, *rest = name.split(".")
    if kind != "mask_token" or name in state:
        return name
    embeds = {s.name: s.embed for s in ours.all_sensors}
    same = [s.name for s in theirs.all_sensors if s.embed == embeds[rest[0]]]
    return ".".join([kind, same[0], *rest[1:]]) if same else name


def _fit(name: str, found: Tensor, like: Tensor, ours: ModelConfig, theirs: ModelConfig) -> Tensor | None:
    """``found`` in the shape of ``like``; None where it cannot be resized to it."""
    if found.shape == like.shape:
        return found
    kind, embed, *_ = name.split(".")
    # Of patch embeddings only the kernels depend on the patch size; their norms and biases are vectors of the width.
    resizable = kind == "to_pixels" or (kind == "patch_embed" and found.ndim == like.ndim == 2)
    if not resizable:
        return None
    new, old = (
        next((s.patch for s in config.all_sensors if s.embed == embed), 0) for config in (ours, theirs)
    )
    if new == old or not old:
        return None
    if kind == "patch_embed":  # (E, band, row, column)
        bands = found.shape[1] // old**2
        if like.shape != (found.shape[0], bands * new**2):
            return None
        kernels = found.unflatten(1, (bands, old * old)).double() @ torch.linalg.pinv(_resizing(old, new))
        return kernels.flatten(1).to(like.dtype)
    bands = found.shape[0] // old**2  # (row, column, band), E or nothing
    if like.shape != (bands * new**2, *found.shape[1:]):
        return None
    pixels = found.unflatten(0, (old * old, bands)).double()
    return torch.einsum("ij,j...->i...", _resizing(old, new), pixels).flatten(0, 1).to(like.dtype)


def _resizing(old: int, new: int) -> Tensor:
    """(new*new, old*old) double: bilinear resizing of a patch as a matrix."""
    pixels = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(pixels, size=(new, new), mode="bilinear", antialias=new < old)
    return resized.flatten(1).T
