"""Cost of a training step, compared with the same model in the formulation of the reference (see reference_step.py).

    python benchmarks/step.py                                        # base on TreeSatAI-TS, batch 8
    python benchmarks/step.py --sizes tiny base --datasets treesatai_ts s2_naip
    python benchmarks/step.py --device cuda --precision bf16 --sizes large --datasets flair_hub --batch 64

One process, one set of parameters, one optimizer: only the formulation changes, alternating, so that both see the same
machine load. A step is masks, forward, backward and AdamW. The reference frees gradients where Lightning does, between
forward and backward; maestro_scale frees them before the forward pass. Peak memory is that of tensors (weights,
moments, gradients, activations), from torch's allocators. Times are those of the fastest step, since
other load only adds time. Prints a table and writes benchmarks/results/step.json; exit code 1 if the two losses differ.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from reference_step import reference_loss
from rich.console import Console
from rich.table import Table
from torch import Tensor

from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import compute_cost
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks
from maestro_scale.model.sizes import SIZES
from maestro_scale.stream.batch import Batch, num_noise
from maestro_scale.training.metrics.meter import peak_tflops
from maestro_scale.training.objectives import hidden_counts
from maestro_scale.training.optimizer import build_optimizer
from maestro_scale.training.run_dir import git_revision

GIB = 2**30
MASKING = MaskingConfig()


@dataclass
class Bench:
    """A model, its optimizer and a batch, used by both formulations."""

    model: Maestro
    optimizer: torch.optim.Optimizer
    batch: Batch
    device: torch.device
    bf16: bool

    def step(self, formulation: str, marks: list[float] | None = None) -> Tensor:
        """One step; returns the loss. ``marks``: times after forward, backward and AdamW are appended."""
        optimizer = self.optimizer
        # On a GPU both use the fused kernel, as the moments of one kernel cannot be used by the other.
        if self.device.type == "cpu":
            for group in optimizer.param_groups:
                group["fused"] = formulation == "ours" or None
        precision = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        if formulation == "ours":
            optimizer.zero_grad()
            with precision:
                loss = self.ours()
        else:
            with precision:
                loss = reference_loss(self.model, self.batch, MASKING)
            optimizer.zero_grad()
        self._mark(marks)
        loss.backward()
        self._mark(marks)
        optimizer.step()
        self._mark(marks)
        return loss.detach()

    def ours(self) -> Tensor:
        """The loss as computed in training."""
        masks = draw_masks(self.model.view(self.batch.dataset), MASKING, self.batch)
        counts = hidden_counts(self.model.view(self.batch.dataset), [masks])
        return self.model(self.batch, masks, counts)[0]

    def disagreement(self) -> float:
        """Relative difference of the two losses for the same masks."""
        view = self.model.view(self.batch.dataset)
        masks = draw_masks(view, MASKING, self.batch)
        with torch.no_grad():
            ours = self.model(self.batch, masks, hidden_counts(view, [masks]))[0]
            theirs = reference_loss(self.model, self.batch, MASKING, {k: m.masked for k, m in masks.items()})
        return abs(float(ours - theirs)) / abs(float(theirs))

    def _mark(self, marks: list[float] | None) -> None:
        if marks is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())


def bench(spec: DatasetSpec, size: str, args: argparse.Namespace) -> Bench:
    """Random weights and a random batch of the preset's shapes."""
    device = torch.device(args.device)
    inter = 3 if args.fusion in ("group", "mod") else 0
    config = ModelConfig(
        sensors=spec.sensors,
        size=SIZES[size],
        pos_grid=spec.pos_grid,
        fusion=args.fusion,
        inter_depth=inter,
        checkpointing=args.checkpointing,
    )
    model = Maestro(config).initialise(0).to(device)
    optimizer = build_optimizer(model, 1e-6, (0.9, 0.99), 1e-8, 0.01)
    return Bench(
        model, optimizer, random_batch(spec, args.batch).to(device), device, args.precision == "bf16"
    )


def random_batch(spec: DatasetSpec, size: int) -> Batch:
    """A random batch. Pixels need not have the sensors' dtypes, since values do not change the cost of a step."""
    generator = torch.Generator().manual_seed(0)
    pixels, dates, noise = {}, {}, {}
    for s in spec.sensors:
        shape = (size, s.num_dates, len(s.bands), s.image_size, s.image_size)
        pixels[s.name] = torch.rand(shape, generator=generator) * s.scale.divisor
        dates[s.name] = torch.tensor([2020, 180, 10], dtype=torch.int16).expand(size, s.num_dates, 3).clone()
        noise[s.name] = torch.rand(size, num_noise(s), generator=generator)
    ref_date = torch.tensor([2020, 180, 0], dtype=torch.int16).expand(size, 3).clone()
    return Batch(spec.name, pixels, dates, ref_date, noise, {}, tuple(map(str, range(size))))


def peak_gib(b: Bench, formulation: str) -> float:
    """GiB of tensors at the peak of a step that follows another: weights, moments, gradients, batch, activations."""
    b.optimizer.zero_grad()
    if b.device.type == "cuda":
        b.step(formulation)
        torch.cuda.reset_peak_memory_stats()
        b.step(formulation)
        return torch.cuda.max_memory_allocated() / GIB
    from torch.profiler import ProfilerActivity, profile

    held = [*b.model.parameters(), *(t for s in b.optimizer.state.values() for t in s.values())]
    held += [*b.batch.pixels.values(), *b.batch.noise.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        b.step(formulation)
        b.step(formulation)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    levels = itertools.accumulate(change for _, change in changes)
    return (sum(t.nbytes for t in held) + max(levels)) / GIB


def measure(spec: DatasetSpec, size: str, args: argparse.Namespace) -> list[dict]:
    """A row per formulation."""
    b = bench(spec, size, args)
    names = ("ours", "reference")
    disagreement = b.disagreement()
    for name in names:  # first touches of memory, moments, caches of shapes
        b.step(name)
    peaks = {name: peak_gib(b, name) for name in names}
    phases: dict[str, list[list[float]]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.steps):
        for name in names:
            marks: list[float] = []
            b._mark(marks)
            busy_s = time.process_time()
            b.step(name, marks)
            cpu[name].append(time.process_time() - busy_s)
            if args.verbose:
                print(
                    name,
                    [f"{b - a:.2f}" for a, b in itertools.pairwise(marks)],
                    os.getloadavg()[0],
                    flush=True,
                )
            phases[name].append([later - earlier for earlier, later in itertools.pairwise(marks)])
    flops = compute_cost(b.model.config, MASKING.ratio).step_flops * args.batch
    peak = peak_tflops(b.device)
    rows = []
    for name in names:
        forward_s, backward_s, optimizer_s = (min(p) for p in zip(*phases[name], strict=True))
        step_s = min(sum(p) for p in phases[name])
        tflops = flops / step_s / 1e12
        rows.append(
            {
                "size": size,
                "dataset": spec.name,
                "formulation": name,
                "batch": args.batch,
                "samples_per_s": args.batch / step_s,
                "step_s": step_s,
                "steps_s": [sum(p) for p in phases[name]],
                "median_step_s": statistics.median(sum(p) for p in phases[name]),
                "cpu_s": min(cpu[name]),
                "median_cpu_s": statistics.median(cpu[name]),
                "forward_s": forward_s,
                "backward_s": backward_s,
                "optimizer_s": optimizer_s,
                "peak_memory_gib": peaks[name],
                "tflops": tflops,
                "mfu": tflops / peak if peak and b.bf16 else None,
                "loss_disagreement": disagreement,
            }
        )
    return rows


def gemm_tflops(device: torch.device, bf16: bool) -> float:
    """TFLOP/s of torch.mm at the size of a large layer: 4096 tokens, 768 → 3072. The best of ten."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.rand(shape, device=device, dtype=dtype) for shape in ((4096, 768), (768, 3072)))
    times = []
    for _ in range(11):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * 4096 * 768 * 3072 / min(times[1:]) / 1e12


def show(rows: list[dict], device: str, precision: str) -> None:
    """Print the table."""
    table = Table(title=f"A training step, {precision} on {device}", title_justify="left")
    for column in (
        "size",
        "dataset",
        "formulation",
        "batch",
        "samples/s",
        "forward, backward, AdamW (s)",
        "peak GiB",
        "TFLOP/s",
        "MFU",
        "speed-up",
        "memory",
    ):
        table.add_column(column, justify="left" if column in ("size", "dataset", "formulation") else "right")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        for row in (theirs, ours):
            ratios = ("", "")
            if row is ours:
                ratios = (
                    f"{ours['samples_per_s'] / theirs['samples_per_s']:.2f}x",
                    f"{ours['peak_memory_gib'] / theirs['peak_memory_gib']:.2f}x",
                )
            table.add_row(
                row["size"],
                row["dataset"],
                row["formulation"],
                str(row["batch"]),
                f"{row['samples_per_s']:.2f}",
                ", ".join(f"{row[k]:.2f}" for k in ("forward_s", "backward_s", "optimizer_s")),
                f"{row['peak_memory_gib']:.2f}",
                f"{row['tflops']:.3f}",
                f"{row['mfu']:.1%}" if row["mfu"] is not None else "",
                *ratios,
            )
    Console(width=150).print(table)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, as CUDA's allocator does; otherwise steps pay for new page faults."""
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((-1, 2**31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
        libc.mallopt(option, value)


def main() -> int:
    """Entry point."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["base"], choices=SIZES)
    parser.add_argument("--datasets", nargs="+", default=["treesatai_ts"], choices=datasets.known())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each formulation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--fusion", default="group", choices=("group", "mod", "monotemp", "shared"))
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "step.json", help="JSON to write"
    )
    parser.add_argument("--verbose", action="store_true", help="print every step")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rows = []
    for dataset in args.datasets:
        for size in args.sizes:
            rows += measure(datasets.spec(dataset), size, args)
            show(rows, name, args.precision)
    gemm = gemm_tflops(torch.device(args.device), args.precision == "bf16")
    print(f"torch.mm: {gemm:.3f} TFLOP/s, the rate that a step of matrix products alone would reach")
    args.out.parent.mkdir(exist_ok=True)
    machine = {"device": name, "processor": platform.machine(), "cores": os.cpu_count()}
    machine |= {"torch": torch.__version__, "precision": args.precision}
    args.out.write_text(
        json.dumps(
            {"machine": machine, "revision": git_revision(), "gemm_tflops": gemm, "rows": rows}, indent=1
        )
        + "\n"
    )
    return (
        0 if all(r["loss_disagreement"] < (1e-4 if args.precision == "fp32" else 1e-2) for r in rows) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
