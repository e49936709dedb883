"""Model sizes by name (arXiv 2508.10894, table of sizes; ``huge`` has the dimensions of ViT-H)."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SIZE = 16_384
"""Of every dimension. A config from elsewhere could ask for a model that takes hours to describe."""


@dataclass(frozen=True)
class Size:
    """Encoder and decoder dimensions. ``depth`` counts the group blocks plus the inter-group blocks."""

    width: int
    depth: int
    heads: int
    dim_head: int
    mlp_ratio: int
    decoder_depth: int
    decoder_width: int = 512
    decoder_heads: int = 16
    decoder_dim_head: int = 32
    decoder_mlp_ratio: int = 4  # of the encoder's width, as in the authors' code

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= MAX_SIZE:
                raise ValueError(f"{name}: is {value}, must be at most {MAX_SIZE}")
        if self.width <= 8 or (self.width - 8) % 4 or (self.decoder_width - 8) % 4:
            raise ValueError(
                f"width {self.width} and decoder_width {self.decoder_width} must be 8 plus a multiple of 4: "
                "8 channels hold the date, the rest four equal sine-cosine blocks"
            )


SIZES = {
    "tiny": Size(width=192, depth=12, heads=3, dim_head=64, mlp_ratio=2, decoder_depth=1),
    "small": Size(width=384, depth=12, heads=6, dim_head=64, mlp_ratio=2, decoder_depth=2),
    "base": Size(width=768, depth=12, heads=12, dim_head=64, mlp_ratio=4, decoder_depth=3),
    "large": Size(width=1024, depth=24, heads=16, dim_head=64, mlp_ratio=4, decoder_depth=4),
    "huge": Size(width=1280, depth=32, heads=16, dim_head=80, mlp_ratio=4, decoder_depth=4),
}
