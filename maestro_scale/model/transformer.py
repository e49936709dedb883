"""Pre-norm transformer blocks with fused attention and optional activation checkpointing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maestro_scale.model.attention import attention_function
from maestro_scale.model.cast import cast_linears
from maestro_scale.model.compiled import CompiledBlock


class Attention(nn.Module):
    """Parameters and kernel ``backend`` (an AttentionChoice) of multi-head self-attention; qkv without bias.

    :class:`Block` computes it, because it casts the parameters of all its layers together.
    """

    def __init__(self, width: int, heads: int, dim_head: int, backend: str = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.attend = attention_function(backend)
        self.qkv = nn.Linear(width, 3 * heads * dim_head, bias=False)
        # As in the authors' code, one head of full width has no output projection.
        self.out = nn.Identity() if heads == 1 and dim_head == width else nn.Linear(heads * dim_head, width)


class Block(nn.Module):
    """x + Attn(LN(x)); x + MLP(LN(x)).

    Reads the parameters of its layers without calling them: see ``GATHER_UNITS`` in maestro.py.
    """

    def __init__(self, width: int, heads: int, dim_head: int, mlp_width: int, backend: str = "auto") -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dim_head, backend)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        """(B, N, E) -> (B, N, E), or (B, N - skip, E): the output at the tokens after the first ``skip`` only.

        ``x`` has the dtype of the norms, fp32 under autocast: a bf16 branch added to it gives fp32.
        """
        linears = [m for m in (self.attn.qkv, self.attn.out, self.up, self.down) if isinstance(m, nn.Linear)]
        h, (qkv, *out, up, down) = cast_linears(self.attn_norm(x), linears)
        # unbind before the heads are transposed: the gradients of q, k and v are then concatenated by one copy.
        q, k, v = F.linear(h, *qkv).unflatten(-1, (3, self.attn.heads, -1)).unbind(2)
        if skip:
            q, x = q[:, skip:], x[:, skip:]
        mixed = self.attn.attend(q, k, v).flatten(2)
        for projection in out:
            mixed = F.linear(mixed, *projection)
        x = mixed + x
        return x + F.linear(F.gelu(F.linear(self.mlp_norm(x), *up)), *down)


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
        self.compiled_block: CompiledBlock | None = None

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        """(B, N, E) -> (B, N, E), or (B, N - skip, E): the last block computes the tokens after the first ``skip``."""
        for output in self._outputs(x, skip):  # a list of all would keep what checkpointing releases
            x = output
        return self.norm(x)

    def at_depths(self, x: Tensor, depths: Collection[int]) -> list[Tensor]:
        """Outputs of the blocks ``depths`` (from 0) in ascending order, each (B, N, E) and through the final norm."""
        return [self.norm(y) for i, y in enumerate(self._outputs(x)) if i in depths]

    def _outputs(self, x: Tensor, skip: int = 0) -> Iterator[Tensor]:
        """The output of each block."""
        # Compiled in training only: evaluation and pictures have other shapes, each of which would be compiled.
        compiled = self.compiled_block if torch.is_grad_enabled() else None
        for i, module in enumerate(self.blocks):
            block = module if compiled is None else partial(compiled, module)
            skipped = skip if i == len(self.blocks) - 1 else 0
            if self.recompute_every and i % self.recompute_every == 0 and torch.is_grad_enabled():
                # Non-reentrant: the reentrant variant drops gradients if x itself requires none.
                x = checkpoint(block, x, skipped, use_reentrant=False)
            else:
                x = block(x, skipped)
            yield x


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B, M) of ``x`` (B, N, E); (B, M, E)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))
