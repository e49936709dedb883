"""The rehearsal step: one step on mock data before the first real one, so that a lack of memory is found at once."""

from __future__ import annotations

import logging
import os

import torch

from maestro_scale.errors import MaestroError
from maestro_scale.stream.device_copy import DeviceCopier
from maestro_scale.training.distributed import World
from maestro_scale.training.engine import Engine
from maestro_scale.training.objectives import Objective

log = logging.getLogger(__name__)

_CPU_ALLOCATOR = "DefaultCPUAllocator: "  # start of torch's message when the system refuses memory


class WarmupError(MaestroError):
    """A step does not fit in memory; the message says what was tried and what needs less."""


def warm_up(
    engine: Engine, world: World, objective: Objective, micro_batch: int, num_micro_batches: int
) -> None:
    """Rehearse a step on mock data on every rank, see ``Engine.rehearse``. WarmupError if memory runs out."""
    where = f"rank {world.rank} on {os.uname().nodename}"
    batch = objective.mock_batch(micro_batch)
    try:
        # The batches of two steps, because training copies those of the next step while it computes.
        copier, of_step = DeviceCopier(world.device), [batch] * num_micro_batches
        batches, _next = (copier.finish(copier.start(of_step)) for _ in range(2))
        inputs = [objective.inputs(batch, on_device) for on_device in batches]
        num_terms = world.sum(objective.num_terms(batch.dataset, inputs))
        engine.rehearse(batches, inputs, num_terms)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error):
            raise WarmupError(
                f"out of memory on {where}, in a step on mock data with micro-batches of {len(batch)} samples of "
                f"{batch.dataset} ({' '.join(str(error).split())[:300]}). Set a smaller train.micro_batch, "
                "model.checkpointing=blocks or a higher deepspeed.zero_optimization.stage; maestro-scale plan "
                "compares them"
            ) from error
        raise
    if world.device.type == "cuda":
        used = torch.cuda.max_memory_reserved(world.device)
        total = torch.cuda.get_device_properties(world.device).total_memory
        used_gib, share = world.maxima([used / 2**30, used / total])
        if world.is_main:
            log.info("warm-up: a step takes up to %.1f GiB, %.0f %% of a device", used_gib, 100 * share)
