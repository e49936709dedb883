"""The rehearsal step: one step on mock data before the first real one, so that a lack of memory is found at once."""

from __future__ import annotations

import os
import time

import torch

from maestro_scale.errors import MaestroError
from maestro_scale.model.config import CompileMode
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.device_copy import DeviceCopier
from maestro_scale.training.device import device_module
from maestro_scale.training.distributed import World
from maestro_scale.training.engine import Engine
from maestro_scale.training.objectives import Objective

# Runs after which a CUDA graph is replayed: the first allocates, the second records, the third is a replay.
GRAPH_RUNS = 3
# Most seconds that compilation may take: during it the main thread reports no progress.
COMPILE_S = 3600.0
_CPU_ALLOCATOR = "DefaultCPUAllocator: "  # start of torch's message when the system refuses memory


class WarmupError(MaestroError):
    """A step does not fit in memory; the message says what was tried and what needs less."""


def warm_up(
    engine: Engine,
    world: World,
    objective: Objective,
    micro_batch: int,
    num_micro_batches: int,
    compile_mode: CompileMode = "none",
) -> None:
    """Rehearse a step on mock data on every rank, see ``Engine.rehearse``. WarmupError if memory runs out.

    Where the network is compiled, a step of every dataset, so that nothing is compiled later.
    """
    started = time.perf_counter()
    batches = objective.mock_batches(micro_batch)
    compiles = compile_mode != "none"
    num_runs = -(-GRAPH_RUNS // num_micro_batches) if compiles and world.device.type == "cuda" else 1
    for batch in batches if compiles else batches[:1]:
        try:
            for _ in range(num_runs):
                _rehearse(engine, world, objective, batch, num_micro_batches)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error):
                raise WarmupError(
                    f"out of memory on rank {world.rank} on {os.uname().nodename}, in a step on mock data with "
                    f"micro-batches of {len(batch)} samples of {batch.dataset} "
                    f"({' '.join(str(error).split())[:300]}). Set a smaller train.micro_batch, "
                    "model.checkpointing=blocks or a higher deepspeed.zero_optimization.stage; maestro-scale plan "
                    "compares them"
                ) from error
            raise
    if compiles:
        (seconds,) = world.maxima([time.perf_counter() - started])
        if world.is_main:
            # Printed, not logged: it explains why the first step came so late.
            print(f"model.compile={compile_mode}: compiled in {seconds:.0f} s", flush=True)
    if (module := device_module(world.device)) is not None:
        used = module.max_memory_reserved(world.device)
        total = module.get_device_properties(world.device).total_memory
        used_gib, share = world.maxima([used / 2**30, used / total])
        if world.is_main:
            print(f"warm-up: a step takes up to {used_gib:.1f} GiB, {share:.0%} of a device", flush=True)


def _rehearse(
    engine: Engine, world: World, objective: Objective, batch: Batch, num_micro_batches: int
) -> None:
    # The batches of two steps, because training copies those of the next step while it computes.
    copier, of_step = DeviceCopier(world.device), [batch] * num_micro_batches
    batches, _next = (copier.finish(copier.start(of_step)) for _ in range(2))
    inputs = [objective.inputs(batch, on_device) for on_device in batches]
    num_terms = world.sum(objective.num_terms(batch.dataset, inputs))
    engine.rehearse(batches, inputs, num_terms)
