"""Section: the same weights and the same batch in fp32 on the CPU and on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import bench_recipe, config_of, specs_of
from benchmarks.gpu_sections.device import exact_fp32
from benchmarks.gpu_sections.record import relative
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks
from maestro_scale.recipe import build_masking
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source
from maestro_scale.training.objectives import hidden_counts

# fp32 sums of up to a million terms in another order.
_LOSS, _SUMS, _GRADIENT, _EMBEDDING = 1e-5, 1e-5, 1e-3, 1e-4
DATASETS = ("treesatai_ts", "flair_hub")


@dataclass(frozen=True)
class Result:
    """One forward and backward pass, on the host. ``gradients`` by parameter."""

    loss: float
    sums: Tensor
    gradients: dict[str, Tensor]
    masked: dict[str, Tensor]
    counts: Tensor
    vector: Tensor


def run(bench: Bench) -> None:
    """Compare both devices on each dataset."""
    exact_fp32()
    for dataset in DATASETS:
        recipe = bench_recipe(dataset, bench.rehearse, "model.size=tiny")
        config = config_of(recipe)
        (spec,) = specs_of(recipe)
        batch = mock_batch(Source(spec, (), cast(Any, None)), config.dataset, 2)
        masking = build_masking(recipe)
        model = Maestro(config).initialise(0)
        host = forward_backward(model, batch, masking, torch.device("cpu"))
        device = forward_backward(model, batch, masking, bench.device.torch)
        compare(bench, dataset, host, device)
        del model
        bench.free()


def forward_backward(model: Maestro, batch: Batch, masking: MaskingConfig, device: torch.device) -> Result:
    """The loss and its gradients on ``device``."""
    model.to(device)
    model.zero_grad(set_to_none=True)
    there = batch.to(device)
    view = model.view(batch.dataset)
    masks = draw_masks(view, masking, there)
    counts = hidden_counts(view, [masks])
    loss, sums = model(there, masks, counts)
    loss.backward()
    with torch.no_grad():
        vector = model.embed(there).vector
    # Copies: Module.to moves gradients in place, also those that were kept from the pass on the CPU.
    gradients = {n: p.grad.to("cpu", copy=True) for n, p in model.named_parameters() if p.grad is not None}
    masked = {name: mask.masked.cpu() for name, mask in masks.items()}
    return Result(loss.item(), sums.cpu(), gradients, masked, counts.cpu(), vector.cpu())


def compare(bench: Bench, dataset: str, host: Result, device: Result) -> None:
    """Check one dataset; the largest difference of a gradient is relative to the norm of that parameter's."""
    record = bench.record
    worst, name = max((difference(device.gradients[n], g), n) for n, g in host.gradients.items())
    record.put(**{dataset: {"loss_cpu": host.loss, "loss_device": device.loss, "worst_gradient": name}})
    record.check(f"{dataset}: loss", relative(device.loss, host.loss), _LOSS)
    record.check(f"{dataset}: error sums", difference(device.sums, host.sums), _SUMS)
    record.check(f"{dataset}: gradients", worst, _GRADIENT, name)
    record.check(f"{dataset}: embedding", difference(device.vector, host.vector), _EMBEDDING)
    same_masks = all(torch.equal(device.masked[n], m) for n, m in host.masked.items())
    record.expect(f"{dataset}: masks are equal", same_masks and torch.equal(device.counts, host.counts))
    record.expect(
        f"{dataset}: the same parameters have gradients", set(device.gradients) == set(host.gradients)
    )


def difference(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference relative to the norm of the reference."""
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))
