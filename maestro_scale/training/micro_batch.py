"""Chooses the micro-batch of ``train.micro_batch: auto`` from the memory that a step is estimated to take."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from maestro_scale.recipe import Recipe, RecipeError
from maestro_scale.training.device import total_memory_bytes
from maestro_scale.training.distributed import World
from maestro_scale.training.memory import USABLE_MEMORY, StepMemory

GIB = 2**30

Estimate = Callable[[Recipe], StepMemory]
"""From a recipe with a number as ``train.micro_batch`` to the memory of a step."""


def micro_batch_of(recipe: Recipe, world: World, estimate: Estimate) -> int:
    """``train.micro_batch``, or for auto the chosen one, which is the same on every rank. A collective.

    Raises RecipeError where not even one sample fits.
    """
    if recipe.train.micro_batch != "auto":
        return recipe.train.micro_batch
    # The smallest memory of all ranks: with micro-batches of different sizes, ranks would make different numbers of
    # forward passes, and the collectives in them would not match.
    memory_bytes = -int(world.maxima([-device_memory(world)])[0])
    micro_batch, memory = largest_micro_batch(recipe, world.size, memory_bytes, estimate)
    if world.is_main:
        share = recipe.train.global_batch // world.size
        engine = memory.device - memory.activations - memory.batches
        # Printed, not logged: the trainer's process shows no log lines below warnings.
        print(
            f"train.micro_batch auto: {micro_batch} of {share} samples per rank, estimated "
            f"{memory.device / GIB:.2f} GiB ({engine / GIB:.2f} weights and optimizer, "
            f"{memory.activations / GIB:.2f} activations, {memory.batches / GIB:.2f} batches) of "
            f"{memory_bytes / GIB:.1f} GiB",
            file=sys.stderr,
            flush=True,
        )
    return micro_batch


def largest_micro_batch(
    recipe: Recipe, world_size: int, memory_bytes: int, estimate: Estimate
) -> tuple[int, StepMemory]:
    """The largest micro-batch that divides a rank's share of the global batch and is estimated to fit, and its memory.

    ``memory_bytes``: of the device; ``USABLE_MEMORY`` of it is used. All micro-batches of a step have the same size.

    Raises:
        RecipeError: not even a micro-batch of one sample fits; the message says what needs less memory.
    """
    share, usable = recipe.train.global_batch // world_size, USABLE_MEMORY * memory_bytes
    for micro_batch in (n for n in range(share, 0, -1) if share % n == 0):
        memory = estimate(recipe.with_micro_batch(micro_batch))
        if memory.device <= usable:
            return micro_batch, memory
    raise RecipeError(
        f"train.micro_batch: auto: a micro-batch of 1 takes an estimated {memory.device / GIB:.1f} GiB "
        f"({memory.footprint.device / GIB:.1f} of them for weights, gradients and optimizer), and "
        f"{USABLE_MEMORY:.0%} of the memory of a rank are {usable / GIB:.1f} GiB: set model.checkpointing=blocks, a "
        "higher deepspeed.zero_optimization.stage, or use more ranks; maestro-scale plan compares them"
    )


def device_memory(world: World) -> int:
    """Bytes of memory of this rank's device; on a CPU, its part of the machine's. A collective.

    Raises RecipeError where the device does not tell.
    """
    device = world.device
    hosts = world.gather(socket.gethostname())
    if device.type == "cpu":
        return _machine_memory() // hosts.count(hosts[world.rank])
    total = total_memory_bytes(device)
    if total is None:
        raise RecipeError(
            f"train.micro_batch: auto: the memory of {device} is not known: give a number of samples"
        )
    return total


def _machine_memory() -> int:
    """Bytes of the machine, or of the container (cgroup v2) where that has fewer."""
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total
