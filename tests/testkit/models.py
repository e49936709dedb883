"""Small models and batches for tests."""

from __future__ import annotations

import torch

from maestro_scale.datasets.spec import Scale, Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.sizes import Size
from maestro_scale.stream.batch import Batch, num_noise

TINY = Size(
    width=32,
    depth=3,
    heads=2,
    dim_head=16,
    mlp_ratio=2,
    decoder_depth=1,
    decoder_width=24,
    decoder_heads=2,
    decoder_dim_head=12,
    decoder_mlp_ratio=2,
)


def small_sensors() -> tuple[Sensor, ...]:
    def sensor(name, size, patch, groups, dates, group, divisor=1.0):
        bands = sum(groups)
        return Sensor(
            name=name,
            source=name,
            image_size=size,
            patch=patch,
            num_dates=dates,
            bands=tuple(range(bands)),
            band_groups=groups,
            token_groups=groups,
            scale=Scale("linear", divisor),
            group=group,
            embed=name,
        )

    return (
        sensor("aerial", 20, 5, (1, 3), 1, "aerial", 255.0),
        sensor("s2", 6, 2, (4, 4, 2), 4, "s2", 5000.0),
        sensor("s1_asc", 6, 2, (1, 1), 2, "s1"),
        sensor("s1_des", 6, 2, (1, 1), 2, "s1"),
    )


def small_config(**changes) -> ModelConfig:
    per_date = changes.get("fusion") in ("monotemp", "shared")
    defaults = {"sensors": small_sensors(), "size": TINY, "pos_grid": 12, "inter_depth": 0 if per_date else 1}
    return ModelConfig(**{**defaults, **changes})


def noise_batch(config: ModelConfig, size: int, seed: int = 0) -> Batch:
    """A batch with noise only, which is enough to draw masks."""
    generator = torch.Generator().manual_seed(seed)
    noise = {s.name: torch.rand(size, num_noise(s), generator=generator) for s in config.sensors}
    return Batch(
        dataset="test",
        pixels={},
        dates={},
        ref_date=torch.zeros(size, 3, dtype=torch.int16),
        noise=noise,
        targets={},
        keys=tuple(map(str, range(size))),
        num_repeated_dates=0,
    )


def full_batch(config: ModelConfig, size: int, seed: int = 0) -> Batch:
    """Random pixels, dates and noise."""
    batch = noise_batch(config, size, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for s in config.sensors:
        shape = (size, s.num_dates, len(s.bands), s.image_size, s.image_size)
        batch.pixels[s.name] = torch.rand(shape, generator=generator) * s.scale.divisor
        day = torch.randint(1, 366, (size, s.num_dates), generator=generator)
        dates = torch.stack([torch.full_like(day, 2020), day, torch.full_like(day, 10)], dim=-1)
        batch.dates[s.name] = dates.to(torch.int16)
    batch.ref_date.copy_(torch.tensor([2020, 180, 0], dtype=torch.int16))
    return batch
