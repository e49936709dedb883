"""Section: the authors' formulation in fp16 with autocast and a loss scale, beside ours at the same micro-batches."""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import torch

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import SPEED_CASES, Case, case_recipe, config_of, rehearsed, specs_of
from benchmarks.gpu_sections.device import exact_fp32
from benchmarks.gpu_sections.record import relative
from benchmarks.gpu_sections.training import new_model
from benchmarks.reference_step import reference_loss
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks
from maestro_scale.recipe import build_masking
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source
from maestro_scale.training.objectives import hidden_counts

_REPEATS = 3
_LOSS = 1e-4  # of fp32


def run(bench: Bench) -> None:
    """Measure each case; their loop has no guard, no metrics and no collective."""
    exact_fp32()
    rows: list[dict[str, Any]] = []
    for case in rehearsed(SPEED_CASES, 1) if bench.rehearse else SPEED_CASES:
        if bench.record.left_s < 10 and not bench.rehearse:
            rows.append({"case": case.title, "skipped": "no time left"})
        else:
            try:
                rows.append({"case": case.title, **measure(bench, case)})
            except torch.OutOfMemoryError as error:
                # It stores attention matrices and images of all pixels: a result, not a failure.
                rows.append({"case": case.title, "skipped": f"out of memory: {str(error)[:100]}"})
        bench.free()
        bench.record.put(rows=rows)


def measure(bench: Bench, case: Case) -> dict[str, Any]:
    """Speed of the training loop of the reference on one GPU."""
    recipe = case_recipe(case, bench.rehearse)
    (spec,) = specs_of(recipe)
    config, device = config_of(recipe), bench.device
    source = Source(spec, (), cast(Any, None))
    batch = mock_batch(source, config.dataset, case.micro_batch, pin=device.is_gpu)
    masking = build_masking(recipe)
    model = new_model(config, 0).to(device.torch)
    difference = disagreement(model, mock_batch(source, config.dataset, 2).to(device.torch), masking)
    bench.record.check(f"{case.title}: the same loss for the same masks", difference, _LOSS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.01)
    scaler = torch.amp.GradScaler(device.torch.type)

    def step() -> torch.Tensor:
        there = batch.to(device.torch, non_blocking=True)
        with torch.autocast(device.torch.type, torch.float16):
            loss = reference_loss(model, there, masking)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    for _ in range(bench.pick(3, 1)):
        loss = step()
    bench.device.start_peak()
    speeds = []
    for _ in range(bench.pick(_REPEATS, 1)):
        device.synchronize()
        started, num_steps = time.perf_counter(), bench.pick(5, 1)
        for _ in range(num_steps):
            loss = step()
        device.synchronize()
        speeds.append(case.micro_batch * num_steps / (time.perf_counter() - started))
    return {
        "samples_per_s": statistics.median(speeds),
        "samples_per_s_range": [min(speeds), max(speeds)],
        "loss": float(loss),
        "peak_bytes": device.peak_bytes(),
    }


@torch.no_grad()
def disagreement(model: Maestro, batch: Batch, masking: MaskingConfig) -> float:
    """Relative difference of our loss and theirs in fp32."""
    view = model.view(batch.dataset)
    masks = draw_masks(view, masking, batch)
    ours, _ = model(batch, masks, hidden_counts(view, [masks]))
    theirs = reference_loss(model, batch, masking, {name: mask.masked for name, mask in masks.items()})
    return relative(ours.item(), theirs.item())
