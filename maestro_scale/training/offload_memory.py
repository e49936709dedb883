"""Checks that offload fits the memory of the nodes, before anything is allocated."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import psutil

from maestro_scale.recipe import RecipeError
from maestro_scale.training.distributed import World
from maestro_scale.training.footprint import footprint

GIB = 2**30


def check_offload_memory(
    parameters: int, config: Mapping[str, Any], num_micro_batches: int, ema: bool, world: World
) -> None:
    """A collective. RecipeError, on all ranks, where offload needs more memory than is free on a node."""
    each = footprint(parameters, world.size, config, num_micro_batches, ema).host
    if not each:
        return
    hosts = world.gather(socket.gethostname())
    num_here = hosts.count(hosts[world.rank])
    needed, free = each * num_here, psutil.virtual_memory().available
    needed_gib, free_gib = world.maxima([needed / GIB, -free / GIB])
    if world.any(needed > free):
        raise RecipeError(
            f"deepspeed.zero_optimization: offload needs {needed_gib:.1f} GiB of memory per node, the fullest has "
            f"{-free_gib:.1f} GiB free: use more nodes, a smaller model, or no offload_{{optimizer,param}}"
        )
