"""Operations of the optimizer step and of DeepSpeed's hooks in the backward pass, at every ZeRO stage.

    python -m benchmarks.optimizer_operations
    python -m benchmarks.optimizer_operations --ranks 2

Runs the engine with the real DeepSpeed on a small model on CPUs and counts what torch dispatches, on a GPU a kernel
launch each (a multi-tensor operation is counted once per 30 tensors; views and allocations are not counted). A step is
DeepSpeed's ``step``: norm, guard, clipping, AdamW, casts and gathers of the new weights. The operations of the hooks
are what a backward pass under DeepSpeed has more than that of the network alone. Also lists where DeepSpeed reads a
value on the host. Exit code 1 if a step has more than MAX_PER_TENSOR operations per tensor, or if the host waits
before AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_sections.cases import bench_recipe, config_of, specs_of
from benchmarks.ranks import run_ranks
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import draw_masks
from maestro_scale.recipe import build_masking
from maestro_scale.recipe.engine_config import Derived, complete_config
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import (
    World,
    destroy_process_group,
    hard_exit,
    init_distributed,
)
from maestro_scale.training.engine import Engine
from maestro_scale.training.guard import Guard
from maestro_scale.training.objectives import hidden_counts
from maestro_scale.training.optimizer import build_optimizer

MAX_PER_TENSOR = 3.0
NUM_MICRO_BATCHES = 2
CASES = [
    (stage, precision)
    for stage in range(4)
    for precision in ("fp32", "bf16", "bf16_weights")
    if stage or precision != "bf16_weights"
]
_PER_LAUNCH = 30  # tensors per launch of a multi-tensor kernel with five lists; more with fewer lists
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "record_stream"}
# In stage 3 DeepSpeed checks the number that OptimizerStep gives it in place of the norm: a tensor of the host, so that
# a GPU is not waited for (tests/device shows it). On CPUs it looks as any other read.
_READS_OF_HOST_TENSORS = {3: 1}
_READ, _ADAM = "_local_scalar_dense", "_fused_adamw_"


@dataclass(frozen=True)
class Row:
    """One ZeRO stage and precision.

    ``operations``: of a step. ``hooks_per_tensor``: per tensor and micro-batch. ``reads``: {file:line: reads per step}
    in DeepSpeed's forward, backward and step; ``reads_before_adam``: of these, in ``step`` before AdamW.
    """

    stage: int
    precision: str
    ranks: int
    tensors: int
    operations: int
    per_tensor: float
    hooks_per_tensor: float
    reads: dict[str, int]
    reads_before_adam: int


class Counted(TorchDispatchMode):
    """Counts operations by name, and reads of the host by place."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.reads_before_adam = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name == _READ:
            self.reads[_place()] += 1
            self.reads_before_adam += _ADAM not in self.operations
        elif name not in _ALLOCATIONS and not _is_view(func):
            lists = [
                len(a)
                for a in args
                if isinstance(a, (list, tuple)) and name.startswith(("_foreach", "_fused"))
            ]
            self.operations[name] += math.ceil(max(lists, default=1) / _PER_LAUNCH)
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.operations.values())


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _place() -> str:
    """Innermost line of DeepSpeed or of this project on the stack."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("deepspeed", "maestro_scale"):
            if f"/{package}/" in frame.filename:
                return f"{package}/{frame.filename.rsplit(f'/{package}/', 1)[1]}:{frame.lineno}"
    return "torch"


class Phases:
    """Counts an engine's forward, backward and step by wrapping the methods of its DeepSpeed engine."""

    def __init__(self, engine: Engine) -> None:
        self.counted = {name: Counted() for name in ("forward", "backward", "step")}
        raw = engine._deepspeed
        for name, counter in self.counted.items():
            setattr(raw, name, self._wrapped(getattr(raw, name), counter))

    def _wrapped(self, function: Any, counter: Counted) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with counter:
                return function(*args, **kwargs)

        return wrapped


def _setup() -> tuple[Maestro, Batch, dict[str, Any]]:
    recipe = bench_recipe("treesatai_ts", True)
    config = config_of(recipe)
    # The mock batch needs the description of the dataset only.
    source = cast(Source, SimpleNamespace(spec=specs_of(recipe)[0], absent=()))
    batch = mock_batch(source, config.dataset, 2)
    masks = draw_masks(config, build_masking(recipe), batch)
    return Maestro(config).initialise(0), batch, masks


def _backward_alone(precision: str) -> int:
    """Operations of a backward pass of the network without DeepSpeed."""
    network, batch, masks = _setup()
    if precision == "bf16_weights":
        network = network.bfloat16()
    low = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with low:
        share, _ = network(batch, masks, hidden_counts(network.config, [masks]))
    counter = Counted()
    with counter:
        share.backward()
    return counter.total


def count(stage: int, precision: str, world: World) -> Row:
    """Count the third step of a run (the first two allocate)."""
    network, batch, masks = _setup()
    tensors = len(list(network.parameters()))
    size = NUM_MICRO_BATCHES * len(batch) * world.size
    derived = Derived(size, len(batch), 1.0, world.size, precision)
    optimizer = build_optimizer(cast(nn.Module, network), 1e-4, (0.9, 0.99), 1e-8, 0.01)
    section = {"zero_optimization": {"stage": stage}}
    # A limit, and means that are in use, so that the guard computes all of its comparisons.
    guard = Guard(10.0, mean_loss=10.0, mean_norm=10.0, seen=1000)
    engine = Engine(network, optimizer, lambda step: 1.0, complete_config(section, derived), world, guard)
    batches, inputs = [batch] * NUM_MICRO_BATCHES, [masks] * NUM_MICRO_BATCHES
    num_terms: Tensor = world.sum(hidden_counts(network.config, inputs))
    for step in range(2):
        engine.step(step, batches, inputs, num_terms)
    phases = Phases(engine).counted
    result = engine.step(2, batches, inputs, num_terms)
    assert result.skipped is None, result.skipped
    step_counts = phases["step"]
    hooks = phases["backward"].total / NUM_MICRO_BATCHES - _backward_alone(precision)
    reads: Counter[str] = Counter()
    for counter in phases.values():
        reads.update(counter.reads)
    return Row(
        stage=stage,
        precision=precision,
        ranks=world.size,
        tensors=tensors,
        operations=step_counts.total,
        per_tensor=round(step_counts.total / tensors, 2),
        hooks_per_tensor=round(hooks / tensors, 2),
        reads=dict(reads),
        reads_before_adam=step_counts.reads_before_adam,
    )


def rows(ranks: int = 1) -> list[Row]:
    """Count every case on ``ranks`` processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.optimizer_operations", "--rank-out", str(out)]
        run_ranks(command, ranks, Path(folder) / "log.txt")
        return [Row(**row) for row in json.loads(out.read_text())]


def problems(found: list[Row]) -> list[str]:
    """The bounds that do not hold."""
    lines = []
    for row in found:
        name = f"ZeRO {row.stage}, {row.precision}, {row.ranks} ranks"
        if row.per_tensor > MAX_PER_TENSOR:
            lines.append(f"{name}: {row.per_tensor} operations per tensor, allowed {MAX_PER_TENSOR}")
        if row.reads_before_adam > _READS_OF_HOST_TENSORS.get(row.stage, 0):
            lines.append(f"{name}: {row.reads_before_adam} reads of the host before AdamW: {row.reads}")
    return lines


def show(found: list[Row]) -> None:
    """Print a table, and where DeepSpeed reads."""
    table = Table(title=f"Operations of an optimizer step, {found[0].tensors} tensors", title_justify="left")
    for column in (
        "ZeRO",
        "precision",
        "ranks",
        "step",
        "per tensor",
        "hooks per tensor and micro-batch",
        "reads",
    ):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for row in found:
        numbers = (row.operations, row.per_tensor, row.hooks_per_tensor, sum(row.reads.values()))
        table.add_row(str(row.stage), row.precision, str(row.ranks), *map(str, numbers))
    Console(width=110).print(table)
    for place in sorted({place for row in found for place in row.reads}):
        print(f"reads on the host: {place}")


def _run_rank(out: Path) -> None:
    torch.set_num_threads(1)
    world = init_distributed()
    found = [asdict(count(stage, precision, world)) for stage, precision in CASES]
    if world.is_main:
        out.write_text(json.dumps(found))
    destroy_process_group()
    hard_exit(0)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_out:
        _run_rank(args.rank_out)
    found = rows(args.ranks)
    show(found)
    lines = problems(found)
    print(*lines, sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
