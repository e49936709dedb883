"""Estimated memory of forward and backward: by hand for a small block, and against the bytes of counted tensors."""

from __future__ import annotations

import dataclasses

import pytest
from testkit.models import TINY, full_batch, small_config, small_sensors

from benchmarks import memory
from maestro_scale.model.activations import activation_bytes, kept_bytes
from maestro_scale.model.config import ModelConfig

PRESETS, SIZES, CHECKPOINTING = (
    ("treesatai_ts", "flair_hub"),
    ("small", "base", "large"),
    memory.CHECKPOINTING,
)


def with_depth(depth: int, **changes) -> ModelConfig:
    size = dataclasses.replace(TINY, depth=depth, width=16, heads=2, dim_head=8, mlp_ratio=2)
    return small_config(sensors=small_sensors()[:1], size=size, inter_depth=0, **changes)


def one_block(precision: str, micro_batch: int = 3, **changes) -> int:
    """Bytes that one more encoder block keeps."""
    more, less = (kept_bytes(with_depth(d, **changes), 0.75, precision, micro_batch) for d in (2, 1))
    return more - less


def test_a_block_keeps_what_can_be_added_up_by_hand():
    # 20 pixels in patches of 5: 16 tokens, of which 12 are masked; 3 samples: 12 visible tokens in all.
    n, width, heads, hidden = 12, 16, 2, 32
    # Two norms keep their inputs, their outputs, and two fp32 statistics per token; attention keeps q, k, v, its output
    # and an fp32 log-sum-exp per head; the MLP its hidden values before and after GELU.
    residual, products = n * 2 * width, n * (2 * width + 4 * width + 2 * hidden)
    statistics = n * (2 * 2 + heads) * 4
    assert one_block("fp32") == 4 * residual + 4 * products + statistics == 9_504
    assert one_block("bf16_weights") == 2 * residual + 2 * products + statistics == 4_896
    # qkv without bias, the output projection, two layers of the MLP: cast to bf16 once.
    weights = (
        3 * width * width + (width * width + width) + (width * hidden + hidden) + (hidden * width + width)
    )
    assert one_block("bf16") == 4 * residual + 2 * products + statistics + 2 * weights == 9_888
    # Recomputed: its fp32 input only, and no casts.
    assert one_block("bf16", checkpointing="blocks") == 4 * n * width == 768


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_estimates_are_within_ten_percent_of_counted_bytes(preset, size, checkpointing):
    case = memory.measure(preset, size, checkpointing, "bf16", 8)
    assert case.estimate == pytest.approx(case.peak, rel=memory.TOLERANCE)
    assert (
        case.estimate > 0.95 * case.peak
    )  # too low is worse than too high: the step would run out of memory


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16_weights"])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_estimates_hold_in_other_precisions(precision, checkpointing):
    case = memory.measure("flair_hub", "small", checkpointing, precision, 4)
    assert case.estimate == pytest.approx(case.peak, rel=memory.TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 64])
def test_estimates_hold_for_small_and_large_micro_batches(micro_batch):
    case = memory.measure("treesatai_ts", "base", "blocks", "bf16", micro_batch)
    assert case.estimate == pytest.approx(case.peak, rel=memory.TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "mod"},
        {"fusion": "monotemp"},
        {"fusion": "shared"},
        {"spectral": "token"},
        {"loss": "l2", "target": "none"},
        {"norm": "token"},
        {"checkpointing": "blocks", "fusion": "mod"},
    ],
    ids=str,
)
def test_estimates_hold_for_variants_of_the_model(changes):
    size = dataclasses.replace(TINY, width=64, decoder_width=48, depth=4)
    config = small_config(size=size, **changes)
    counted = memory.count(config, full_batch(config, 16), "bf16", 0.75)
    assert activation_bytes(config, 0.75, "bf16", 16) == pytest.approx(counted.peak, rel=0.15)
