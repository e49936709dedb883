"""Measures what DeepSpeed allocates and sends: peak tensor bytes of a rank, bytes per collective. Run as a script.

The one argument is a JSON file: {"out": file, "tasks": [{"name", "precision", "section", "accumulate", "ema"}]}. Each
task runs two steps; the second is measured.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from testkit import layouts
from testkit.models import TINY, small_config

# Wide enough that weights outweigh batches.
CONFIG = small_config(size=dataclasses.replace(TINY, width=128, decoder_width=128, mlp_ratio=4))


def storages() -> dict[int, int]:
    """{address: bytes} of all tensor storages created since gc.freeze(), without activations held by autograd."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


class Sent:
    """Counts the bytes that this rank sends, by collective, assuming ring algorithms."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        for names, kind, size, rounds in (
            (("all_reduce",), "all_reduce", 0, 2),
            (
                ("reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter_single"),
                "reduce_scatter",
                1,
                1,
            ),
            (("all_gather_into_tensor", "_all_gather_base", "all_gather_single"), "all_gather", 0, 1),
        ):
            for name in names:
                if hasattr(dist, name):
                    setattr(dist, name, self._counted(getattr(dist, name), kind, size, rounds))
        self._inside = False

    def _counted(self, call, kind: str, which: int, rounds: int):
        def counted(*args, **kwargs):
            tensors = [*args, *kwargs.values()]
            whole = tensors[which]
            if not self._inside and isinstance(whole, torch.Tensor):
                ring = (dist.get_world_size() - 1) / dist.get_world_size()
                self.bytes[kind] += rounds * ring * whole.numel() * whole.element_size()
            outer, self._inside = self._inside, True
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = outer

        return counted


def run_task(task: dict, world, sent: Sent) -> dict:
    from maestro_scale.model.maestro import Maestro
    from maestro_scale.recipe.engine_config import Derived, complete_config
    from maestro_scale.training.ema import WeightEMA
    from maestro_scale.training.engine import Engine
    from maestro_scale.training.guard import Guard
    from maestro_scale.training.optimizer import build_optimizer

    gc.collect()
    gc.freeze()
    accumulate, size = task["accumulate"], layouts.GLOBAL_BATCH
    derived = Derived(size, size // world.size // accumulate, 1.0, world.size, task["precision"])
    model = Maestro(CONFIG).initialise(0)
    first = next(model.parameters())
    optimizer = build_optimizer(model, **layouts.SETTINGS)
    engine = Engine(
        model, optimizer, layouts.schedule, complete_config(task["section"], derived), world, Guard(0.0)
    )
    ema = WeightEMA(0.9, engine.sharded.fragments) if task["ema"] else None
    parts, masks, counts = layouts.global_batches(CONFIG, 0, world.size * accumulate)
    inputs = [t for p in parts for part in (p.pixels, p.noise, p.dates) for t in part.values()]
    inputs += [
        getattr(m, f)
        for mask in masks
        for m in mask.values()
        for f in ("masked", "visible_index", "masked_index")
    ]
    not_held = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    held: dict[str, int] = {}

    def glance() -> int:
        gc.collect()  # otherwise tensors in reference cycles are counted or not, depending on the collector
        time.sleep(0.02)  # Gloo's thread releases a bucket only after the collective has returned
        return sum(size for address, size in storages().items() if address not in not_held)

    def look(moment: str) -> None:
        found = min(glance() for _ in range(5))
        held[moment] = max(held.get(moment, 0), found)

    # Its gradient comes last; and just before the optimizer step.
    first.register_post_accumulate_grad_hook(lambda p: look("end of backward"))
    judging = engine._reduce_loss
    engine._reduce_loss = lambda *args: (look("before the optimizer"), judging(*args))
    mine = range(world.rank * accumulate, (world.rank + 1) * accumulate)
    for step in range(2):
        sent.bytes.clear()
        engine.step(step, [parts[i] for i in mine], [masks[i] for i in mine], counts)
        if ema is not None:
            ema.update(step + 1)
    look("between steps")
    return {"parameters": task_parameters(model), "held": held, "sent": dict(sent.bytes)}


def task_parameters(model) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def main() -> None:
    sent = Sent()
    from maestro_scale.training.distributed import destroy_process_group, hard_exit, init_distributed

    torch.set_num_threads(1)
    order = json.loads(Path(sys.argv[1]).read_text())
    world = init_distributed()
    results = {}
    for task in order["tasks"]:
        results[task["name"]] = run_task(task, world, sent)
        gc.collect()
    if world.is_main:
        Path(order["out"]).write_text(json.dumps(results))
    destroy_process_group()
    hard_exit(0)


if __name__ == "__main__":
    main()
