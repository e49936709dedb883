"""Attention kernels, checkpointing and compilation do not change results; costs agree with profilers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import TINY, full_batch, small_config

from maestro_scale.model import attention
from maestro_scale.model.activations import kept_bytes
from maestro_scale.model.cost import compute_cost
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks
from maestro_scale.training.objectives import hidden_counts

CPU = torch.device("cpu")


def gradient(model: Maestro, batch) -> tuple[float, torch.Tensor]:
    masks = draw_masks(model.config, MaskingConfig(), batch)
    loss, _ = model(batch, masks, hidden_counts(model.config, [masks]))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_every_kernel_that_runs_here_gives_the_same_gradient():
    names = attention.available_backends(CPU, torch.float32, 16)
    assert {"flash", "math"} <= set(names)
    results = {}
    for name in ("auto", *names):
        config = small_config(attention=name)
        results[name] = gradient(Maestro(config).initialise(0), full_batch(config, 3))
    for loss, grad in results.values():
        assert loss == pytest.approx(results["math"][0], rel=1e-5)
        assert torch.allclose(grad, results["math"][1], rtol=1e-3, atol=1e-6)


def test_the_kernel_is_reported_or_refused():
    assert attention.resolve_backend("auto", CPU, torch.float32, 64) in ("flash", "math")
    assert attention.resolve_backend("math", CPU, torch.float32, 64) == "math"
    with pytest.raises(ValueError, match=r"'cudnn' does not run on cpu in float32 .* use one of auto, flash"):
        attention.resolve_backend("cudnn", CPU, torch.float32, 64)
    with pytest.raises(ValueError, match="'flash_attn' does not run on cpu"):
        attention.resolve_backend("flash_attn", CPU, torch.float32, 64)
    with pytest.raises(ValueError, match="use one of auto, flash"):
        small_config(attention="fast")


@pytest.mark.parametrize("checkpointing", ["blocks", "every_2", "every_3"])
def test_checkpointed_blocks_store_less_and_give_the_same_gradient(checkpointing):
    size = dataclasses.replace(TINY, depth=6, decoder_depth=4)

    def run(how: str) -> tuple[torch.Tensor, int]:
        config = small_config(size=size, checkpointing=how)
        batch, model = full_batch(config, 4), Maestro(config).initialise(0)
        kept = 0

        def keep(t: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += t.numel() * (t.untyped_storage().data_ptr() not in weights)
            return t

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            masks = draw_masks(config, MaskingConfig(), batch)
            loss, _ = model(batch, masks, hidden_counts(config, [masks]))
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), kept

    (expected, most), (found, kept) = run("none"), run(checkpointing)
    assert torch.equal(found, expected)
    assert kept < most
    config = small_config(size=size, checkpointing=checkpointing)
    plain = small_config(size=size)
    assert kept_bytes(config, 0.75, "fp32", 4) < kept_bytes(plain, 0.75, "fp32", 4)
    assert (
        compute_cost(plain, 0.75).step_flops
        < compute_cost(config, 0.75).step_flops
        <= 4 * compute_cost(plain, 0.75).forward_flops
    )


def test_costs_of_checkpointing_some_blocks_lie_between_none_and_all():
    size = dataclasses.replace(TINY, depth=6, decoder_depth=4)
    configs = [small_config(size=size, checkpointing=how) for how in ("none", "every_3", "every_2", "blocks")]
    flops = [compute_cost(c, 0.75).step_flops for c in configs]
    kept = [kept_bytes(c, 0.75, "fp32", 4) for c in configs]
    assert flops == sorted(flops)
    assert kept == sorted(kept, reverse=True)
    with pytest.raises(ValueError, match="every_2, every_3"):
        small_config(checkpointing="every_1")


def test_activations_equal_what_autograd_stores():
    config = small_config()
    batch, model = full_batch(config, 4), Maestro(config).initialise(0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        masks = draw_masks(config, MaskingConfig(), batch)
        model(batch, masks, hidden_counts(config, [masks]))
    assert kept_bytes(config, 0.75, "fp32", 4) == pytest.approx(sum(n for n, _ in kept.values()), rel=0.05)


@pytest.mark.parametrize(
    ("fusion", "spectral"), [("group", "joint"), ("monotemp", "joint"), ("group", "token")]
)
def test_flops_equal_what_deepspeed_counts(fusion, spectral):
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    config = small_config(fusion=fusion, spectral=spectral, attention="math")
    batch, model = full_batch(config, 2), Maestro(config).initialise(0)
    masks = draw_masks(config, MaskingConfig(), batch)
    counts = hidden_counts(config, [masks])
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with torch.no_grad():
        model(batch, masks, counts)
    counted = 2 * profiler.get_total_macs()
    profiler.end_profile()
    assert 2 * compute_cost(config, 0.75).forward_flops == pytest.approx(counted, rel=0.02)


# The default backend takes minutes to compile on two cores; what it traces is the same (docs/model.md has its curve).
def test_compiled_blocks_follow_the_same_loss_curve():
    def curve(compiled: bool) -> list[float]:
        config = small_config(fusion="mod", inter_depth=0)
        model = Maestro(config).initialise(0)
        if compiled:
            model.compile_training("blocks", backend="aot_eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(4):
            batch = full_batch(config, 2, seed=step)
            masks = draw_masks(config, MaskingConfig(), batch)
            loss, _ = model(batch, masks, hidden_counts(config, [masks]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert curve(True) == pytest.approx(curve(False), rel=1e-5)
