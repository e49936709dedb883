"""Runs small training tasks on one or several real processes; layouts.py describes a task."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from maestro_scale.training.distributed import free_port
from testkit import layouts
from testkit.runs import Job


def launch(folder: Path, ranks: int, tasks: list[dict]) -> dict[str, dict]:
    """Run tasks on ``ranks`` ranks; {task: result of rank 0}."""
    out = folder / f"out-{ranks}-{tasks[0]['name']}"
    out.mkdir()
    order = out / "order.json"
    order.write_text(json.dumps({"out": str(out), "tasks": tasks}))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    commands = [
        ([sys.executable, layouts.__file__, str(order)], {**env, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(ranks)
    ]
    job = Job(commands, out / "log.txt")
    assert job.wait(500) == 0, job.output[-4000:]
    found = {
        t["name"]: [json.loads((out / f"{t['name']}-rank{r}.json").read_text()) for r in range(ranks)]
        for t in tasks
    }
    for name, results in found.items():
        assert all(r == results[0] for r in results), f"{name}: ranks disagree"
    return {name: results[0] for name, results in found.items()}


def task(stage: int, name: str, steps: int = 20, start: int = 0, **more) -> dict:
    return {"name": name, "stage": stage, "steps": steps, "start": start, **more}
