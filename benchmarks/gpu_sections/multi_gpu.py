"""Section: ZeRO 2 over all GPUs of the machine (NCCL) against one rank.

As a module it is one rank: ``python -m benchmarks.gpu_sections.multi_gpu RECIPE RUN_DIR`` with RANK and WORLD_SIZE set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import small_recipe
from benchmarks.gpu_sections.data import write_synthetic
from benchmarks.gpu_sections.record import max_relative
from benchmarks.gpu_sections.training import losses, metrics, run_on_shards
from maestro_scale.recipe import load_recipe
from maestro_scale.training.distributed import free_port, hard_exit
from maestro_scale.training.run import run_pretraining
from maestro_scale.training.stop import StopRequest

_LIMIT = 2e-3


def run(bench: Bench) -> None:
    """Compare the loss curves."""
    num_ranks = 2 if bench.rehearse else bench.device.num_gpus()
    if num_ranks < 2:
        bench.record.skip("one GPU")
        return
    shards = write_synthetic(bench.work, "treesatai_ts", {"train": bench.pick(64, 8)})
    recipe = small_recipe(
        shards,
        bench.work,
        bench.rehearse,
        f"data.lanes={num_ranks}",
        f"train.steps={bench.pick(20, 2)}",
        f"train.global_batch={8 * num_ranks if bench.device.is_gpu else 4}",
        f"train.micro_batch={8 if bench.device.is_gpu else 2}",
        "deepspeed.zero_optimization.stage=2",
    )
    path = bench.work / "multi_gpu.yaml"
    path.write_text(recipe.to_yaml())
    run_dir = bench.work / "runs" / "all-ranks"
    launch(path, run_dir, num_ranks, max(bench.record.left_s, 1))
    alone = run_on_shards(bench, recipe, "one-rank")
    for ranks, folder in ((num_ranks, run_dir), (1, alone)):
        speed = metrics(folder)[-1]["samples_per_s"]
        bench.record.put(**{f"{ranks} ranks": {"losses": losses(folder), "samples_per_s": speed}})
    bench.record.check(f"{num_ranks} ranks against 1", max_relative(losses(run_dir), losses(alone)), _LIMIT)


def launch(recipe: Path, run_dir: Path, num_ranks: int, timeout_s: float) -> None:
    """Run a training; RuntimeError with the end of its output if a rank fails or the time is over."""
    command = [sys.executable, "-m", "benchmarks.gpu_sections.multi_gpu", str(recipe), str(run_dir)]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    log = run_dir.parent / f"{run_dir.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
            for rank in range(num_ranks)
        ]
        try:
            codes = [p.wait(timeout_s) for p in processes]
        finally:
            for p in processes:
                p.kill()
    if any(codes):
        raise RuntimeError(f"{num_ranks} ranks: exit codes {codes}\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    run_pretraining(load_recipe(sys.argv[1]), Path(sys.argv[2]), StopRequest())
    hard_exit(0)
