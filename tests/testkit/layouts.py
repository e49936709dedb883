"""Trains a small model on all ranks of a launch, once per task, each with its ZeRO stage. Run as a script.

The one argument is a JSON file: {"out": folder, "tasks": [{"name", "stage", "steps", "start", "load", "save", …}]}.
``out``/<task>-rank<r>.json gets the losses and the digests of the final weights; only that of rank 0 is read.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from pathlib import Path

import torch

from testkit.models import full_batch, small_config

GLOBAL_BATCH = 8
SETTINGS = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
CLIP = 0.3  # below the gradient norms of the first steps, so that clipping is active
SEED = 5


def config_of(task: dict):
    return small_config(checkpointing="blocks" if task.get("recompute") else "none")


def global_batches(config, step: int, cuts: int):
    """The global batch of a step, cut into equal parts, with their masks and the global counts."""
    from maestro_scale.model.masking import MaskingConfig, draw_masks
    from maestro_scale.training.objectives import hidden_counts

    whole = full_batch(config, GLOBAL_BATCH, seed=100 + 2 * step)
    size = GLOBAL_BATCH // cuts
    parts = [_rows(whole, slice(i * size, (i + 1) * size)) for i in range(cuts)]
    masking = MaskingConfig(0.75, 0.25, 0.25, 0.25, 0.0)
    masks = [draw_masks(config, masking, p) for p in parts]
    return parts, masks, hidden_counts(config, masks)


def _rows(batch, rows):
    import dataclasses

    part = batch.map(lambda t: t[rows])
    return dataclasses.replace(part, keys=batch.keys[rows])


def schedule(step: int) -> float:
    return 1.0 / (1 + step)


def run_task(task: dict, world) -> dict:
    from maestro_scale.model.maestro import Maestro
    from maestro_scale.recipe.engine_config import Derived, complete_config
    from maestro_scale.training.checkpoint.checkpoints import Checkpoints
    from maestro_scale.training.checkpoint.record import Position
    from maestro_scale.training.checkpoint.retention import Retention
    from maestro_scale.training.checkpoint.state import TrainState
    from maestro_scale.training.ema import WeightEMA
    from maestro_scale.training.engine import Engine
    from maestro_scale.training.fragments import MOMENTS
    from maestro_scale.training.guard import Guard
    from maestro_scale.training.optimizer import build_optimizer

    torch.manual_seed(0)
    accumulate = task.get("accumulate", 1)
    config = config_of(task)
    derived = Derived(
        GLOBAL_BATCH,
        GLOBAL_BATCH // world.size // accumulate,
        task.get("clip", CLIP),
        world.size,
        task.get("precision", "fp32"),
    )
    section = {"zero_optimization": {"stage": task["stage"], **task.get("zero", {})}}
    model = Maestro(config).initialise(SEED)
    engine = Engine(
        model,
        build_optimizer(model, **SETTINGS),
        schedule,
        complete_config(section, derived),
        world,
        Guard(0.0),
    )
    state = TrainState(engine.sharded, WeightEMA(0.8, engine.sharded.fragments))
    result = {"losses": [], "norms": []}
    if load := task.get("load"):
        checkpoints = Checkpoints(Path(load), world, Retention(9))
        position = checkpoints.resume(state, {}).position
        assert position.step == task["start"]
    if task.get("rehearse"):
        rehearse(task, engine, config, world)
    poison = Poison(model, task.get("poison", []), world.rank)
    for step in range(task["start"], task["start"] + task["steps"]):
        if step in task.get("omit", []):
            continue
        poison.begin(step)
        parts, masks, counts = global_batches(config, step, world.size * accumulate)
        mine = range(world.rank * accumulate, (world.rank + 1) * accumulate)
        if [world.rank, step] in task.get("plant", []):
            next(iter(parts[mine[-1]].pixels.values())).fill_(torch.nan)
        taken = engine.step(step, [parts[i] for i in mine], [masks[i] for i in mine], counts)
        if taken.skipped is None:
            state.ema.update(step + 1)
        result["losses"].append(taken.loss)
        result["norms"].append(taken.norm)
        result.setdefault("skipped", []).append(taken.skipped)
    result["adam_step"] = engine.sharded.adam_step
    result["rng"] = digest([torch.get_rng_state()])
    result["guard"] = engine.guard.state_dict()
    held = [f.weights for f in engine.sharded.fragments]
    held += [engine.sharded.moment(f, m) for f in engine.sharded.fragments for m in MOMENTS]
    computing = [getattr(p, "ds_tensor", p) for p in model.parameters()]  # stage 3: this rank's part
    for key, tensors in ("state", [*held, *state.ema.averages]), ("weights", computing):
        digests = [None] * world.size
        torch.distributed.all_gather_object(digests, digest(tensors))
        result[key] = digests
    if save := task.get("save"):
        checkpoints = Checkpoints(Path(save), world, Retention(9))
        checkpoints.begin(state, Position(0, task["start"] + task["steps"]), {}, {})
        checkpoints.finish()
    return result


class Poison:
    """Puts a value into one gradient of the model, in the first micro-batch of a step on one rank.

    ``wanted``: [[rank, step, number of the parameter, value], …].
    """

    def __init__(self, model, wanted: list, rank: int) -> None:
        self._wanted = [w for w in wanted if w[0] == rank]
        self._due: dict[int, float] = {}
        parameters = list(model.parameters())
        for number in {w[2] for w in self._wanted}:
            parameters[number].register_hook(lambda grad, number=number: self._change(number, grad))

    def begin(self, step: int) -> None:
        self._due = {number: float(value) for _, at, number, value in self._wanted if at == step}

    def _change(self, number: int, gradient):
        if number not in self._due:
            return gradient
        changed = gradient.clone()
        changed.view(-1)[0] = self._due.pop(number)
        return changed


def rehearse(task: dict, engine, config, world) -> None:
    """Run the warm-up; with ``room_mb`` under that memory limit, to test the error."""
    from maestro_scale.model.masking import MaskingConfig
    from maestro_scale.training.objectives import PretrainObjective
    from maestro_scale.training.warmup import warm_up

    class MockObjective(PretrainObjective):
        def mock_batches(self, micro_batch):
            return [full_batch(config, micro_batch, seed=1)]

    if room_mb := task.get("room_mb"):
        size_kb = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (size_kb * 1024 + room_mb * 2**20,) * 2)
    accumulate = task.get("accumulate", 1)
    size = task.get("size", GLOBAL_BATCH // world.size // accumulate)
    name = full_batch(config, 1, seed=1).dataset
    warm_up(engine, world, MockObjective({name: config}, {}, MaskingConfig()), size, accumulate)


def digest(tensors) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def main() -> None:
    from maestro_scale.errors import MaestroError
    from maestro_scale.training.distributed import destroy_process_group, hard_exit, init_distributed

    torch.set_num_threads(1)
    order = json.loads(Path(sys.argv[1]).read_text())
    world = init_distributed()
    for task in order["tasks"]:
        try:
            result = run_task(task, world)
        except MaestroError as error:
            result = {"error": str(error)}
        (Path(order["out"]) / f"{task['name']}-rank{world.rank}.json").write_text(json.dumps(result))
    destroy_process_group()
    hard_exit(0)


if __name__ == "__main__":
    main()
