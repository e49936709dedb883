"""Pre-norm transformer blocks with fused attention and optional activation checkpointing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maestro_scale.model.attention import attention_function


class Attention(nn.Module):
    """Multi-head self-attention with the kernel ``backend`` (an AttentionChoice); qkv without bias."""

    def __init__(self, width: int, heads: int, dim_head: int, backend: str = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.attend = attention_function(backend)
        self.qkv = nn.Linear(width, 3 * heads * dim_head, bias=False)
        # As in the authors' code, one head of full width has no output projection.
        self.out = nn.Identity() if heads == 1 and dim_head == width else nn.Linear(heads * dim_head, width)

    def forward(self, x: Tensor, output_index: Tensor | None = None) -> Tensor:
        """(B, N, E) -> (B, N, E); with ``output_index`` (B, M): the output at these tokens only, (B, M, E)."""
        # unbind before the heads are transposed: the gradients of q, k and v are then concatenated by one copy.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if output_index is not None:
            q = gather_tokens(q.flatten(2), output_index).unflatten(-1, (self.heads, -1))
        return self.out(self.attend(q, k, v).flatten(2))


class Block(nn.Module):
    """x + Attn(LN(x)); x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, dim_head: int, mlp_width: int, backend: str = "auto") -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dim_head, backend)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor, output_index: Tensor | None = None) -> Tensor:
        """(B, N, E) -> (B, N, E), or (B, M, E) at the tokens of ``output_index`` (B, M)."""
        mixed = self.attn(self.attn_norm(x), output_index)
        x = mixed + (x if output_index is None else gather_tokens(x, output_index))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """A stack of blocks and a final LayerNorm. ``recompute_every``: n for activation checkpointing (non-reentrant) of
    every n-th block, beginning with the first, which stores only its input; 0: none."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        dim_head: int,
        mlp_width: int,
        recompute_every: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dim_head, mlp_width, backend) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.recompute_every = recompute_every

    def forward(self, x: Tensor, output_index: Tensor | None = None) -> Tensor:
        """(B, N, E) -> (B, N, E), or (B, M, E) at the tokens ``output_index`` (B, M), all the last block computes."""
        for i, block in enumerate(self.blocks):
            only = output_index if i == len(self.blocks) - 1 else None
            if self.recompute_every and i % self.recompute_every == 0 and torch.is_grad_enabled():
                # Non-reentrant: the reentrant variant drops gradients if x itself requires none.
                x = checkpoint(block, x, only, use_reentrant=False)
            else:
                x = block(x, only)
        return self.norm(x)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B, M) of ``x`` (B, N, E); (B, M, E)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))
