"""What the records of a run say about its steps: where the host waits, and what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testkit.simulated.recorder import COPY, MARK, MIX, RACE, SYNC, Record, load

# Phases of a step without a log line, a picture, a checkpoint or an evaluation, see testkit/simulated/phases.py.
STEP = {"copy", "masks", "forward", "backward", "optimizer", "ema", "step", "training"}
# (file, function) of the two reads of a step.
DECISION = ("maestro_scale/training/engine.py", "_read_decision")
FLAGS = ("maestro_scale/training/trainer.py", "_train")


def run_script(script: Path, folder: Path, shards: Path) -> dict[str, dict[str, Any]]:
    """What a script of tests/device writes, in a process of its own: {run: {"records": [Record], …}}."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder), str(shards)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    if done.returncode:
        pytest.fail((done.stdout + done.stderr)[-3000:], pytrace=False)
    runs = json.loads((folder / f"{script.stem}.json").read_text())
    for run in runs.values():
        run["records"] = load(run["records"])
    return runs


@dataclass(frozen=True)
class Step:
    """The records from the begin of a step's forward pass to that of the next one's. ``is_first``: it is the first step
    of its dataset, or the next one is."""

    records: list[Record]
    is_first: bool
    is_last: bool

    @property
    def own_waits(self) -> list[Record]:
        """The project's own synchronisations in the phases of a step, without those of the first step of a dataset,
        in which the model copies constants to the device, such as position encodings."""
        found = [r for r in self.records if r.kind == SYNC and r.phase in STEP and of_project(r)]
        return [r for r in found if not (self.is_first and is_constant(r))]


def steps_of(records: list[Record]) -> list[Step]:
    """The steps of a run, without the rehearsal step."""
    starts = [i for i, r in enumerate(records) if r.kind == MARK]
    datasets = [records[i].detail for i in starts]
    first = {datasets.index(name) for name in datasets}
    return [
        Step(records[a:b], not {i, i + 1}.isdisjoint(first), i == len(starts) - 1)
        for i, (a, b) in enumerate(zip(starts, [*starts[1:], len(records)], strict=True))
    ]


def of_project(record: Record) -> bool:
    return record.package != "deepspeed"


def is_constant(record: Record) -> bool:
    return record.file.startswith("maestro_scale/model/") and record.op == "host to device"


def violations(records: list[Record]) -> list[str]:
    """What is wrong with a run, as lines with the file and the line of each place."""
    wrong = [r for r in records if r.kind in (MIX, RACE)]
    for step in steps_of(records):
        wrong += [r for r in step.own_waits if (r.file, r.function) not in (DECISION, FLAGS)]
        wrong += [
            r
            for r in step.records
            if r.kind == COPY and r.phase == "copy" and (r.stream == 0 or "pageable" in r.detail)
        ]
    return [str(r) for r in wrong]
