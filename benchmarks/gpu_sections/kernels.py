"""Section: attention kernels in use, kernel launches of a step, and the kernels that take the most time."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import SPEED_CASES, Case, case_recipe, config_of, rehearsed
from benchmarks.gpu_sections.training import ProfileHook, run_on_mock_batch
from maestro_scale.model import attention

_DTYPES = {"fp32": torch.float32}  # any other precision multiplies in bf16


def run(bench: Bench) -> None:
    """Profile one step of each case."""
    cases = rehearsed(SPEED_CASES, 1) if bench.rehearse else SPEED_CASES[:3]
    for case in cases:
        if bench.record.left_s < 10 and not bench.rehearse:
            bench.record.unavailable(case.title, "no time left")
            continue
        recipe = case_recipe(case, bench.rehearse)
        hook = ProfileHook(bench.device, after=bench.pick(5, 1))
        run_on_mock_batch(bench, recipe, "kernels", [hook])
        profile = dataclasses.asdict(hook.profile)
        if hook.profile.busy_s is not None:
            profile["busy_share"] = hook.profile.busy_s / hook.profile.wall_s
        bench.record.put(**{case.title: {"attention_backend": backends(bench, case), **profile}})


def backends(bench: Bench, case: Case) -> dict[str, str]:
    """{channels per head: backend} that PyTorch selects for the encoder and the decoder."""
    recipe = case_recipe(case, bench.rehearse)
    config = config_of(recipe)
    dtype = _DTYPES.get(recipe.train.precision_on(bench.device.torch.type), torch.bfloat16)
    return {
        str(dim): attention.resolve_backend(config.attention, bench.device.torch, dtype, dim)
        for dim in (config.size.dim_head, config.size.decoder_dim_head)
    }
