"""Real pretraining runs on the simulated device, with the real DeepSpeed. Run as a script: FOLDER SHARDS.

Writes FOLDER/training.json: per run its records, without kernels other than the optimizer's, and its losses.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from testkit.simulated import accelerator, inject
from testkit.simulated.phases import name_phases
from testkit.simulated.tensor import DEVICE, host_groups, recorder, simulation

STEPS = 8
SHORT = ("checkpoint.every_steps=100", "train.warmup_check=false", "train.log_every=100")


class Quiet:
    """An observer and a watchdog that do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


@dataclass
class Runs:
    """Runs of one recipe. ``found``: what :func:`main` writes."""

    folder: Path
    recipe: Path
    found: dict[str, Any] = field(default_factory=dict)

    def pretrain(
        self,
        name: str,
        *overrides: str,
        device: torch.device = DEVICE,
        run: str | None = None,
        evaluates: bool = False,
    ) -> None:
        """A pretraining on ``device`` in the folder ``run`` (default: its name)."""
        from maestro_scale.evaluation.in_loop import evaluation_hooks
        from maestro_scale.recipe import load_recipe
        from maestro_scale.training.distributed import World
        from maestro_scale.training.pretrain import no_evaluation, pretrain
        from maestro_scale.training.stop import StopRequest

        recipe = load_recipe(str(self.recipe), ["data.workers=0", *overrides])
        run_dir = self.folder / (run or name)
        run_dir.mkdir(exist_ok=True)
        world = World(rank=0, size=1, local_rank=0, device=device, control=host_groups[0])
        accelerator.use(device)
        recorder.records.clear()
        hooks = evaluation_hooks if evaluates else no_evaluation
        outcome = pretrain(recipe, run_dir, world, [Quiet()], Quiet(), StopRequest(), evaluation=hooks)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        self.found[name] = {
            "records": recorder.dump(),
            "reason": outcome.reason,
            "step": outcome.position.step,
            "losses": {line["step"]: line["loss"] for line in lines},
            "datasets": {line["step"]: line["dataset"] for line in lines},
            "scores": {line["step"]: line["eval/knn"] for line in lines if "eval/knn" in line},
        }


def join() -> None:
    """A process group of one rank, DeepSpeed on the simulated device, and named phases."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    accelerator.use(DEVICE)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    host_groups.append(dist.new_group(backend="gloo"))
    name_phases(recorder)
    from maestro_scale.evaluation.probes import linear

    linear._MAX_ITERATIONS = 3  # 20 reads each


def run_all(runs: Runs) -> None:
    from maestro_scale.model import masking, targets
    from maestro_scale.stream import device_copy

    full = (
        "tracking.pictures_every=3",
        "optim.ema=0.99",
        "evaluation.every_steps=5",
        "checkpoint.every_steps=4",
    )
    runs.pretrain("full", f"train.steps={STEPS}", *full, evaluates=True)
    runs.pretrain("resumed", f"train.steps={STEPS + 2}", *full, run="full", evaluates=True)
    for stage in (0, 1, 3):
        runs.pretrain(f"stage {stage}", f"deepspeed.zero_optimization.stage={stage}", "train.steps=4", *SHORT)
    runs.pretrain("bf16", "train.precision=bf16", "train.steps=4", *SHORT)
    runs.pretrain("cpu", "train.steps=4", *SHORT, device=torch.device("cpu"))
    # Runs with a mistake in them, which must be found.
    for name, function, text in (
        ("item", targets.combine_losses, "sums.sum().item()"),
        ("list", masking.draw_masks, "torch.tensor([1.0], device=batch.ref_date.device)"),
        ("mix", masking.draw_masks, "batch.ref_date + torch.ones(3)"),
        ("no wait", device_copy.DeviceCopier.finish, "return copies.batches"),
    ):
        with inject.statement(function, text) as place:
            runs.pretrain(name, "train.steps=4", *SHORT)
        runs.found[name]["place"] = place


def main(folder: Path, shards: Path) -> None:
    from testkit.runs import write_mixture_recipe

    join()
    runs = Runs(folder, write_mixture_recipe(folder, shards))
    with simulation():
        run_all(runs)
    (folder / "training.json").write_text(json.dumps(runs.found))
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads would abort the interpreter's shutdown


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
