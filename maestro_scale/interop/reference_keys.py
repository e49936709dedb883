"""Mapping between parameter names of maestro_scale and of IGNF/MAESTRO, in both directions, without loss.

Source: the state dicts of the published checkpoints. Only names and shapes differ: there, convolution kernels are
stored as (E, C, P, P) and (P*P*C, W, 1, 1), mask tokens as (1, G, 1, 1, W).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from maestro_scale.model.config import ModelConfig

_BLOCK = {
    "attn_norm": "0.norm",
    "attn.qkv": "0.to_qkv",
    "attn.out": "0.to_out.0",
    "mlp_norm": "1.net.0",
    "up": "1.net.1",
    "down": "1.net.4",
}
_STACKS = {"encoders": "encoder", "inter": "encoder_inter", "decoders": "decoder"}

# (pattern of a maestro_scale name, reference name); \1, \2 … are the groups of the pattern.
_RULES = (
    (r"patch_embed\.(\w+)\.(\d+)\.proj\.(\w+)", r"patch_embed.\1.patchify_bands.\2.conv.\3"),
    (r"patch_embed\.(\w+)\.(\d+)\.norm\.(\w+)", r"patch_embed.\1.patchify_bands.\2.norm.\3"),
    (r"to_decoder\.(\w+)\.(\w+)", r"enc_to_dec.\1.\2"),
    (r"to_pixels\.(\w+)\.(\d+)\.(\w+)", r"embed_to_rec.\1.pixelify_bands.\2.conv.\3"),
    (r"mask_token\.(\w+)\.vectors", r"mask_token.\1"),
    (r"heads\.(\w+)\.pool\.norm_out\.(\w+)", r"heads.\1.reduce.norm_fc.\2"),
    (r"heads\.(\w+)\.pool\.([\w.]+)", r"heads.\1.reduce.\2"),
)
_HEAD_LINEAR = re.compile(r"heads\.(\w+)\.linear\.(\w+)")
_STACK = re.compile(r"(encoders|decoders)\.(\w+)\.|inter\.")
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def reference_name(name: str, segmentation_heads: frozenset[str] = frozenset()) -> str:
    """Reference name of a parameter; that of a head which the reference does not have stays. KeyError if no rule covers
    it."""
    for pattern, template in _RULES:
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    if match := _HEAD_LINEAR.fullmatch(name):
        last = "conv" if match[1] in segmentation_heads else "linear"
        return f"heads.{match[1]}.{last}.{match[2]}"
    if match := _STACK.match(name):
        prefix = f"{_STACKS[match[1]]}.{match[2]}" if match[1] else _STACKS["inter"]
        rest = name[match.end() :]
        if inside := _IN_BLOCK.fullmatch(rest):
            return f"{prefix}.layers.{inside[1]}.{_BLOCK[inside[2]]}.{inside[3]}"
        return f"{prefix}.{rest}"
    if name.startswith("heads."):  # of a decoder that the reference does not have
        return name
    raise KeyError(f"no rule maps the parameter {name!r} to a name of the reference checkpoints")


def from_reference(
    reference: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    segmentation_heads: frozenset[str] = frozenset(),
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Rename and reshape reference tensors to fit the state dict ``model_state``.

    Returns (state dict, missing names of the model, reference names that are not used). ValueError, with both
    shapes, if a tensor has another number of elements.
    """
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    used: set[str] = set()
    for name, like in model_state.items():
        key = reference_name(name, segmentation_heads)
        if key not in reference:
            missing.append(name)
            continue
        used.add(key)
        if reference[key].numel() != like.numel():
            raise ValueError(
                f"{key} has shape {tuple(reference[key].shape)}, the model's {name} {tuple(like.shape)}"
            )
        state[name] = reference[key].reshape(like.shape)
    return state, missing, sorted(set(reference) - used)


def to_reference(model_state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of :func:`from_reference` for a full state dict: reference names and shapes, unchanged values."""
    segmentation = frozenset(t.name for t in config.heads if t.kind == "segmentation")
    embeds = {s.embed: s for s in config.all_sensors}
    reference = {}
    for name, tensor in model_state.items():
        key = reference_name(name, segmentation)
        kind, part = key.split(".")[:2]
        if kind == "patch_embed" and key.endswith("conv.weight"):
            patch = embeds[part].patch
            tensor = tensor.reshape(len(tensor), -1, patch, patch)
        elif key.endswith("conv.weight") and tensor.dim() == 2:
            tensor = tensor[..., None, None]
        elif kind == "mask_token":
            tensor = tensor[None, :, None, None]
        reference[key] = tensor.contiguous()
    return reference
