"""Memory of a pretraining micro-batch: counted on tensors without data, beside the estimate that plan uses.

    python -m benchmarks.memory                      # small, base, large x both presets x checkpointing, bf16
    python -m benchmarks.memory --precisions fp32 bf16_weights --sizes base
    python -m benchmarks.memory --check              # exit code 1 where an estimate is off by more than 10 %

Forward and backward run under FakeTensorMode: every operation is dispatched with the real shapes and dtypes, and no
memory is allocated. The counter adds the bytes of each storage when an operation creates it and subtracts them when its
last tensor is freed. Counted are the bytes beyond weights, batch and gradients (each gradient is freed as soon as it is
complete; training/footprint.py accounts for it): ``kept`` after the forward pass, ``peak`` over both passes. The CPU's
flash attention keeps the same tensors for the backward pass as the CUDA one: q, k, v, the output and the log-sum-exp.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.model.activations import activation_bytes
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig
from maestro_scale.recipe import build_model_config, load_recipe, resolve_spec
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source
from maestro_scale.training.objectives import PretrainObjective

MIB, TOLERANCE = 2**20, 0.1
RECIPES = Path(__file__).parents[1] / "recipes"
PRESETS = {"treesatai_ts": "treesatai_ts.yaml", "flair_hub": "flair_hub.yaml"}
SIZES = ("small", "base", "large")
CHECKPOINTING = ("none", "blocks", "every_2")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations created under this mode: ``live`` now, and at their ``peak``.

    ``existing``: tensors of which operations return views (weights, batch); their storages do not count.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._existing = {id(s): s for s in (t.untyped_storage() for t in existing)}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages or key in self._existing:  # a view, or the result of an in-place operation
            return

        def freed(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size


@dataclass(frozen=True)
class Counted:
    """Bytes beyond weights, batch and gradients. ``kept``: after the forward pass; ``peak``: over both passes."""

    kept: int
    peak: int


def count(config: ModelConfig, batch: Batch, precision: str, ratio: float) -> Counted:
    """Count a micro-batch of a model in a precision: fp32, bf16 (autocast) or bf16_weights."""
    objective = PretrainObjective({batch.dataset: config}, {}, MaskingConfig(ratio=ratio))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = _model(config, torch.bfloat16 if precision == "bf16_weights" else torch.float32)
        batch = batch.map(lambda t: t if isinstance(t, FakeTensor) else fake.from_tensor(t))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_free_gradient)
        with torch.no_grad():  # fills the model's caches of constants
            masks = objective.inputs(batch, batch)
            model(batch, masks, objective.num_terms(batch.dataset, [masks]))
            del masks
        counter = LiveBytes([*model.parameters(), *batch.tensors])
        with counter:
            masks = objective.inputs(batch, batch)
            counts = objective.num_terms(batch.dataset, [masks])
            with _autocast(precision):
                loss, _ = model(batch, masks, counts)
            kept = counter.live
            loss.backward()
    return Counted(kept, counter.peak)


def _model(config: ModelConfig, dtype: torch.dtype) -> Maestro:
    torch.set_default_dtype(dtype)
    try:
        return Maestro(config)
    finally:
        torch.set_default_dtype(torch.float32)


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    preset: str
    size: str
    checkpointing: str
    precision: str
    micro_batch: int
    kept: int
    peak: int
    estimate: int

    @property
    def error(self) -> float:
        """Relative error of the estimate."""
        return self.estimate / self.peak - 1


def measure(preset: str, size: str, checkpointing: str, precision: str, micro_batch: int) -> Case:
    """Count and estimate one case."""
    spec, config, ratio = preset_model(preset, size, checkpointing)
    source = Source(spec=spec, shards=(), store=None)  # type: ignore[arg-type]  # a mock batch reads no shard
    counted = count(config, mock_batch(source, config.dataset, micro_batch), precision, ratio)
    estimate = activation_bytes(config, ratio, precision, micro_batch)
    return Case(preset, size, checkpointing, precision, micro_batch, counted.kept, counted.peak, estimate)


def preset_model(
    preset: str, size: str, checkpointing: str = "none"
) -> tuple[DatasetSpec, ModelConfig, float]:
    """The resolved spec, the model and the mask ratio of a recipe, without its shards."""
    changes = [f"model.size={size}", f"model.checkpointing={checkpointing}"]
    recipe = load_recipe(str(RECIPES / PRESETS[preset]), changes)
    entry = recipe.data.mixture[0]
    spec = resolve_spec(datasets.spec(entry.dataset), entry, 0)
    return spec, build_model_config(recipe, [spec]), recipe.masking.ratio


def main() -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--checkpointing", nargs="+", default=list(CHECKPOINTING))
    parser.add_argument("--precisions", nargs="+", default=["bf16"])
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument(
        "--check", action="store_true", help="exit code 1 where an estimate is off by over 10 %%"
    )
    parser.add_argument("--out", type=Path, help="also write the cases as JSON")
    args = parser.parse_args()
    cases = list(_cases(args))
    table = Table(title=f"MiB beyond weights, gradients and batch, micro-batch {args.micro_batch}")
    for column in ("preset", "size", "checkpointing", "precision", "kept", "peak", "estimate", "error"):
        table.add_column(column, justify="left" if column in ("preset", "size") else "right")
    for c in cases:
        numbers = (f"{n / MIB:.1f}" for n in (c.kept, c.peak, c.estimate))
        table.add_row(c.preset, c.size, c.checkpointing, c.precision, *numbers, f"{c.error:+.1%}")
    Console(width=110).print(table)
    if args.out:
        args.out.write_text(json.dumps([{**asdict(c), "error": c.error} for c in cases], indent=1))
    return int(args.check and any(abs(c.error) > TOLERANCE for c in cases))


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    for preset in args.presets:
        for size in args.sizes:
            for checkpointing in args.checkpointing:
                for precision in args.precisions:
                    yield measure(preset, size, checkpointing, precision, args.micro_batch)


if __name__ == "__main__":
    sys.exit(main())
