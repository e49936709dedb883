"""Transformer blocks of published vision transformers, and their weights from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.interop.export import ExportError
from maestro_scale.interop.restricted import load_untrusted


class Attention(nn.Module):
    """Self-attention over the tokens that are valid."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(N, S, E); ``valid`` (N, S) bool: tokens that are attended to, None for all."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if valid is None else valid[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, E) -> (…, E)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block (ViT, arXiv 2010.11929), with the parameter names of published weights."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(N, S, E) -> (N, S, E); ``valid`` as of Attention."""
        x = x + self.attn(self.norm1(x), valid)
        return x + self.mlp(self.norm2(x))


def num_blocks(state: Mapping[str, Tensor]) -> int:
    """The number of blocks that a state dict has parameters of."""
    numbers = [int(name.split(".")[1]) for name in state if name.startswith("blocks.")]
    return max(numbers, default=-1) + 1


@torch.no_grad()
def initialise_linear(module: nn.Module) -> None:
    """Linear layers as in the original code of Presto and Galileo: Xavier uniform, biases 0; norms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, (nn.LayerNorm, nn.Conv2d)):
            part.reset_parameters()


def read_file(path: Path) -> Any:
    """The content of a file of ``torch.save`` or safetensors, within bounds. EvaluationError if it is neither."""
    try:
        return untrusted.load_tensors(path) if path.suffix == ".safetensors" else load_untrusted(path)
    except (ExportError, untrusted.InputError, OSError) as error:
        raise EvaluationError(f"{path}: cannot be read as weights ({error})") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file. EvaluationError as of ``read_file``, and where it has none."""
    content = read_file(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise EvaluationError(f"{path}: is not a state dict: a mapping of names to tensors is expected")
    return {str(name): tensor.clone() for name, tensor in content.items()}


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load all parameters and buffers of ``module``. EvaluationError where ``state`` lacks one or has another shape."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    for names, reason in ((missing, "it lacks"), (unknown, "it has the unknown")):
        if names:
            raise EvaluationError(
                f"{path}: is not the weights of {what}: {reason} {shorten(names[0])} and {len(names) - 1} more"
            )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise EvaluationError(
                f"{path}: is not the weights of {what}: {name} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    module.load_state_dict(dict(state))
