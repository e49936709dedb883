"""What predicts a target from encoded tokens: the table of decoders, and those that are more than a pooling.

Shapes: B batch, S sensors, R token grids per sensor, L tokens per grid, E width, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_scale.datasets.spec import Sensor, Target
from maestro_scale.model.heads import (
    POOLS,
    AttentivePool,
    ClassificationHead,
    RegressionHead,
    RegressionMapHead,
    SegmentationHead,
    Standardised,
    num_outputs,
    pixels_of_cells,
    resize_tokens,
    tokens_by_cell,
)

Tokens = dict[str, Tensor]
"""{sensor: (B, R, L, E)}."""


@dataclass(frozen=True)
class HeadInputs:
    """What the head of a target is built for. ``sensors``: by name, those whose tokens it is given; ``num_depths``: of
    the encoder, whose tokens it is given (1: the last only). ``grid``: cells per side of a map, ``side``: pixels per
    side of a cell; 0 for a target of whole tiles. ``pool``: a key of ``POOLS``."""

    target: Target
    width: int
    sensors: tuple[str, ...]
    grid: int
    side: int
    num_depths: int = 1
    pool: str = "attentive"


class LinearHead(nn.Module):
    """One linear map of each sensor's mean over dates and, of a target of whole tiles, over places.

    A sensor that the tiles lack gets the mean of the others, as the features of a probe do.
    """

    def __init__(self, inputs: HeadInputs) -> None:
        super().__init__()
        self.grid, self.side, self.sensors = inputs.grid, inputs.side, inputs.sensors
        width = inputs.width * len(inputs.sensors)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_outputs(inputs.target) * max(inputs.side, 1) ** 2)

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, C), or (B, C, grid*side, grid*side)."""
        if self.side:
            means = {
                name: resize_tokens(x.mean(dim=1, keepdim=True), self.grid).squeeze(2)
                for name, x in tokens.items()
            }
        else:
            means = {name: x.mean(dim=(1, 2)) for name, x in tokens.items()}
        if len(means) < len(self.sensors):
            means |= dict.fromkeys(
                set(self.sensors) - set(means), torch.stack(list(means.values())).mean(dim=0)
            )
        outputs = self.linear(self.norm(torch.cat([means[name] for name in self.sensors], dim=-1)))
        return pixels_of_cells(outputs, self.grid, self.side) if self.side else outputs


class UPerNet(nn.Module):
    """UPerNet (arXiv 1807.10221) on maps of one grid, as a plain transformer has them.

    ``in_channels``: of each map, the shallowest first. The maps become levels of ``finest``, half of that, … 1 times
    their resolution, and the deepest of half of it. That one is pooled over 1, 2, 3 and 6 cells per side, levels are
    added from the deepest to the finest, and all are fused at the finest. ``side``: output pixels per side of a cell,
    of which the finest level has ``finest``, the largest of 4, 2 and 1 that divides it; each of its cells predicts the
    rest at once, as a patch does. GroupNorm, not BatchNorm: results do not depend on how a batch is split.
    """

    def __init__(
        self, in_channels: Sequence[int], num_outputs: int, side: int = 4, channels: int | None = None
    ) -> None:
        super().__init__()
        channels = channels or min(256, max(32, min(in_channels) // 32 * 32))
        self.finest = math.gcd(side, 4)
        factors = [self.finest / 2**i for i in range(len(in_channels) - 1)]
        self.laterals = nn.ModuleList(
            _Level(c, channels, max(factor, 1)) for c, factor in zip(in_channels, [*factors, 1], strict=True)
        )
        self.bins = nn.ModuleList(_NormConv(channels, channels, 1) for _ in _BINS)
        self.bottleneck = _NormConv(channels * (1 + len(_BINS)), channels, 3)
        self.smooth = nn.ModuleList(_NormConv(channels, channels, 3) for _ in in_channels[:-1])
        self.fuse = _NormConv(channels * len(in_channels), channels, 3)
        self.classify = nn.Conv2d(channels, num_outputs * (side // self.finest) ** 2, 1)
        self._step = side // self.finest

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, in_channels[i], g, g) -> (B, C, g*side, g*side)."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        if min(levels[-1].shape[-2:]) > 1:
            levels[-1] = F.avg_pool2d(levels[-1], 2, ceil_mode=True, count_include_pad=False)
        deepest = levels[-1]
        pooled = [
            _resized(conv(_pooled(deepest, k)), deepest) for k, conv in zip(_BINS, self.bins, strict=True)
        ]
        levels[-1] = self.bottleneck(torch.cat([deepest, *pooled], dim=1))
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + _resized(levels[i + 1], levels[i])
        outputs = [conv(x) for conv, x in zip(self.smooth, levels[:-1], strict=True)]
        fused = self.fuse(torch.cat([_resized(x, levels[0]) for x in (*outputs, levels[-1])], dim=1))
        return F.pixel_shuffle(self.classify(fused), self._step)


_BINS = (1, 2, 3, 6)


class _Level(nn.Sequential):
    """A map with ``factor`` (1, 2, 4) times the resolution."""

    def __init__(self, inputs: int, outputs: int, factor: float) -> None:
        step = int(factor)
        up = nn.ConvTranspose2d(inputs, outputs, step, step) if step > 1 else nn.Conv2d(inputs, outputs, 1)
        super().__init__()
        self.resize, self.norm, self.activation = up, _group_norm(outputs), nn.GELU()


class _NormConv(nn.Sequential):
    """Convolution, normalisation, GELU; by name, since ``initialise`` goes by names."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm, self.activation = _group_norm(outputs), nn.GELU()


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")


def _pooled(x: Tensor, bins: int) -> Tensor:
    """Adaptive average pooling to at most ``bins`` cells per side, by matrix products: their gradients are
    deterministic on every device."""
    rows, columns = (_bin_weights(n, min(bins, n), x) for n in x.shape[-2:])
    return rows @ x @ columns.T


def _bin_weights(size: int, bins: int, like: Tensor) -> Tensor:
    """(bins, size): rows sum to 1. Computed on the device, which the host does not wait for."""
    cell = torch.arange(size, device=like.device)
    first = torch.arange(bins, device=like.device)[:, None]
    inside = (cell >= first * size // bins) & (cell < ((first + 1) * size + bins - 1) // bins)
    weights = inside.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


class UPerNetHead(nn.Module):
    """UPerNet over the tokens of several depths, whose sensors and dates are pooled attentively at each cell.

    It adds to what the attentive head predicts from the deepest: the pyramid takes far more steps to learn than a
    linear layer, and corrects it where it has.
    """

    def __init__(self, inputs: HeadInputs) -> None:
        super().__init__()
        self.grid, self.side = inputs.grid, inputs.side
        self.linear = nn.Linear(inputs.width, inputs.side**2 * num_outputs(inputs.target))
        # Of encoders that show the last depth only, all levels are made from it.
        self.pools = nn.ModuleList(AttentivePool(inputs.width) for _ in range(inputs.num_depths))
        self.net = UPerNet([inputs.width] * NUM_LEVELS, num_outputs(inputs.target), inputs.side)

    def forward(self, tokens: Tokens | Sequence[Tokens]) -> Tensor:
        """Tokens by depth -> (B, C, grid*side, grid*side)."""
        depths = [tokens] if isinstance(tokens, dict) else tokens
        maps = [self._map(pool, t) for pool, t in zip(self.pools, depths, strict=True)]
        correction = self.net([maps[i * len(maps) // NUM_LEVELS] for i in range(NUM_LEVELS)])
        cells = self.linear(maps[-1].flatten(2).transpose(1, 2))
        return pixels_of_cells(cells, self.grid, self.side) + correction

    def _map(self, pool: nn.Module, tokens: Tokens) -> Tensor:
        cells = tokens_by_cell(tokens, self.grid)
        pooled = pool(cells.flatten(0, 1)).unflatten(0, (cells.shape[0], self.grid, self.grid))
        return pooled.permute(0, 3, 1, 2)


NUM_LEVELS = 4


class _StandardisedLinear(Standardised, LinearHead):
    """Standardised values; see ``in_units``."""

    def __init__(self, inputs: HeadInputs) -> None:
        super().__init__(inputs)
        self._register_scale()


class _StandardisedUPerNet(Standardised, UPerNetHead):
    """Standardised values; see ``in_units``."""

    def __init__(self, inputs: HeadInputs) -> None:
        super().__init__(inputs)
        self._register_scale()


def _attentive(inputs: HeadInputs) -> nn.Module:
    target, width, pool = inputs.target, inputs.width, POOLS[inputs.pool](inputs.width)
    is_number = target.kind == "regression"
    if not inputs.side:
        return (RegressionHead if is_number else ClassificationHead)(target, width, pool)
    return (RegressionMapHead if is_number else SegmentationHead)(
        target, width, pool, inputs.grid, inputs.side
    )


def _linear(inputs: HeadInputs) -> nn.Module:
    return (_StandardisedLinear if inputs.target.kind == "regression" else LinearHead)(inputs)


def _upernet(inputs: HeadInputs) -> nn.Module:
    return (_StandardisedUPerNet if inputs.target.kind == "regression" else UPerNetHead)(inputs)


@dataclass(frozen=True)
class Decoder:
    """``build``: the head of a target. ``num_depths``: of the encoder whose tokens it reads, evenly spread to the last;
    a head of several takes a list of tokens by depth. ``maps_only``: it does not predict labels of whole tiles."""

    build: Callable[[HeadInputs], nn.Module]
    num_depths: int = 1
    maps_only: bool = False

    def depths(self, depth: int) -> tuple[int, ...]:
        """Numbers of the blocks that it reads, of an encoder of ``depth`` blocks."""
        return evenly_spread(depth, self.num_depths)


DECODERS: Mapping[str, Decoder] = {
    "attentive": Decoder(_attentive),
    "linear": Decoder(_linear),
    "upernet": Decoder(_upernet, num_depths=NUM_LEVELS, maps_only=True),
}
"""By the names of ``config.DecoderName``."""


def evenly_spread(depth: int, count: int) -> tuple[int, ...]:
    """At most ``count`` blocks of ``depth``, ascending, the last included: ``(2, 5, 8, 11)`` of 12."""
    return tuple(dict.fromkeys(max(-(-(i + 1) * depth // count) - 1, 0) for i in range(count)))


def build_head(
    target: Target,
    width: int,
    pool: str,
    ref: Sensor | None,
    side: int,
    decoder: str = "attentive",
    sensors: Iterable[str] = (),
    num_depths: int = 1,
) -> nn.Module:
    """The head of a target. ``pool``: a key of ``POOLS``; ``ref``: the sensor whose token grid a map is predicted on,
    ``side``: pixels per side of each token; ``decoder``: a key of ``DECODERS``; ``sensors``, ``num_depths``: as of
    HeadInputs.

    ValueError where the decoder does not predict such a target.
    """
    if not target.is_map and DECODERS[decoder].maps_only:
        raise ValueError(f"decoder {decoder} predicts maps; {target.name} is a label of the whole tile")
    assert ref is not None or not target.is_map  # ModelConfig requires a reference sensor for a map
    grid, side = (ref.grid, side) if ref is not None and target.is_map else (0, 0)
    return DECODERS[decoder].build(HeadInputs(target, width, tuple(sensors), grid, side, num_depths, pool))
