"""Operations that a training step dispatches, compared with those before the step was restructured.

    python -m benchmarks.operations               # prints the table
    python -m benchmarks.operations --check       # exit code 1 if a bound does not hold, naming it
    python -m benchmarks.operations --out benchmarks/results/operations.json

On a GPU each operation is at least one kernel launch, which costs about 5 µs whatever its size. Counted are dispatched
ATen operations except views and allocations; the gradient of a slice counts twice (a fill and a copy). Tensors are fake
(FakeTensorMode), so no weights are allocated and any size can be counted; the operations are those of a CPU, where
autocast casts the same tensors. Phases: ``masks`` (masks and counts), ``forward`` (with the loss), ``backward`` of one
micro-batch. ``benchmarks/optimizer_operations.py`` counts the step of the optimizer at each ZeRO stage, and has the
bounds for it.

The bound of a micro-batch: in ``bf16`` (autocast, the default on GPUs) its phases together have at least 30 % fewer
operations than at fb61061. ``bf16_weights`` and ``fp32``, which have no casts to combine, have no bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_scale import datasets
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks
from maestro_scale.recipe import build_model_config, load_recipe, resolve_spec
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source
from maestro_scale.training.objectives import hidden_counts

RECIPES = Path(__file__).parents[1] / "recipes"
CASES = tuple((d, s) for d in ("treesatai_ts", "flair_hub") for s in ("base", "large"))  # vitb and vitl
PRECISIONS = ("bf16", "bf16_weights", "fp32")
MICRO_BATCH = 6  # the number of operations does not depend on it
MAX_SHARE = 0.7

# Operations of the phases (masks, forward, backward) at fb61061, by dataset, size and precision. Recorded by
#   git worktree add /tmp/base fb61061
#   PYTHONPATH=/tmp/base python benchmarks/operations.py --record
BASELINE = {
    "flair_hub base bf16": (118, 1415, 1624),
    "flair_hub base bf16_weights": (118, 957, 1070),
    "flair_hub base fp32": (118, 938, 1065),
    "flair_hub large bf16": (118, 2395, 3116),
    "flair_hub large bf16_weights": (118, 1477, 2006),
    "flair_hub large fp32": (118, 1458, 2001),
    "treesatai_ts base bf16": (92, 1103, 1247),
    "treesatai_ts base bf16_weights": (92, 752, 822),
    "treesatai_ts base fp32": (92, 737, 818),
    "treesatai_ts large bf16": (92, 1838, 2366),
    "treesatai_ts large bf16_weights": (92, 1142, 1524),
    "treesatai_ts large fp32": (92, 1127, 1520),
}

VIEWS = frozenset(
    {
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "expand",
        "lift_fresh",
    }
    | {
        "narrow",
        "permute",
        "reshape",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "squeeze_",
        "t",
    }
    | {"transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view"}
)
ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
NO_KERNEL = frozenset({"is_same_size"})
TWO_KERNELS = frozenset({"select_backward", "slice_backward"})


class OperationCount(TorchDispatchMode):
    """Counts dispatched operations by phase and name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.phase = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count and run."""
        space, name = func._schema.name.split("::")
        if space != "prim" and name not in VIEWS | ALLOCATIONS | NO_KERNEL:
            self.counts[self.phase, name] += 2 if name in TWO_KERNELS else 1
        return func(*args, **(kwargs or {}))

    def of_phase(self, phase: str) -> int:
        """Operations of a phase."""
        return sum(n for (p, _), n in self.counts.items() if p == phase)


@dataclass(frozen=True)
class Row:
    """One line of the table. ``bound``: the largest allowed number; None: no bound."""

    name: str
    operations: int
    bound: int | None
    detail: str = ""

    @property
    def problem(self) -> str | None:
        """What is wrong, else None."""
        if self.bound is None or self.operations <= self.bound:
            return None
        return f"{self.name}: {self.operations} operations, at most {self.bound} are allowed"


def micro_batch_operations(dataset: str, size: str, precision: str) -> OperationCount:
    """Operations of masks, forward and backward of one micro-batch of a recipe."""
    recipe = load_recipe(str(RECIPES / f"{dataset}.yaml"), [f"model.size={size}"])
    entry = recipe.data.mixture[0]
    spec = resolve_spec(datasets.spec(entry.dataset), entry, 0)
    config = build_model_config(recipe, [spec])
    batch = mock_batch(Source(spec=spec, shards=(), store=cast(Any, None)), config.dataset, MICRO_BATCH)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        if precision == "bf16_weights":
            torch.set_default_dtype(torch.bfloat16)
        try:
            model = Maestro(config)
        finally:
            torch.set_default_dtype(torch.float32)
        batch = batch.map(fake.from_tensor)
        for _ in range(2):  # the first pass builds the constants
            model.zero_grad()
            count = OperationCount()
            with count:
                count.phase = "masks"
                masks = draw_masks(config, MaskingConfig(), batch)
                counts = hidden_counts(config, [masks])
                count.phase = "forward"
                with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                    loss, _ = model(batch, masks, counts)
                count.phase = "backward"
                loss.backward()
    return count


def phases(count: OperationCount) -> tuple[int, int, int]:
    """Operations of masks, forward and backward."""
    return count.of_phase("masks"), count.of_phase("forward"), count.of_phase("backward")


def micro_batch_row(dataset: str, size: str, precision: str) -> Row:
    """The row of one case."""
    name = f"{dataset} {size} {precision}"
    now, before = phases(micro_batch_operations(dataset, size, precision)), BASELINE[name]
    bound = int(MAX_SHARE * sum(before)) if precision == "bf16" else None
    parts = ", ".join(
        f"{phase} {new} (was {old})"
        for phase, new, old in zip(("masks", "forward", "backward"), now, before, strict=True)
    )
    return Row(name, sum(now), bound, f"{sum(now) / sum(before) - 1:+.1%} of {sum(before)}: {parts}")


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table(title="Operations of a training step", title_justify="left")
    for column in ("case", "operations", "bound", "holds", "compared with fb61061"):
        table.add_column(column, justify="right" if column in ("operations", "bound") else "left")
    for row in rows:
        bound = "" if row.bound is None else str(row.bound)
        holds = "" if row.bound is None else "no" if row.problem else "yes"
        table.add_row(row.name, str(row.operations), bound, holds, row.detail)
    Console(width=150).print(table)


def main(args: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", default=sorted({d for d, _ in CASES}))
    parser.add_argument("--sizes", nargs="+", default=sorted({s for _, s in CASES}))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--no-optimizer", action="store_true", help="leave out the optimizer's step")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bound does not hold")
    parser.add_argument("--record", action="store_true", help="print the numbers of BASELINE")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(args)
    cases = [
        (d, s, p)
        for d in options.datasets
        for s in options.sizes
        for p in options.precisions
        if (d, s) in CASES
    ]
    if options.record:
        for case in cases:
            print(f'    "{" ".join(case)}": {phases(micro_batch_operations(*case))},', flush=True)
        return 0
    rows = [micro_batch_row(*case) for case in cases]
    show(rows)
    problems = [row.problem for row in rows if row.problem]
    content = {"torch": torch.__version__, "micro_batch": [asdict(row) for row in rows]}
    if not options.no_optimizer:
        from benchmarks import optimizer_operations  # fb61061, where --record runs, lacks what it imports

        steps = optimizer_operations.rows()
        optimizer_operations.show(steps)
        problems += optimizer_operations.problems(steps)
        content["optimizer"] = [asdict(step) for step in steps]
    if options.out:
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(problems) or "all bounds hold")
    return int(options.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
