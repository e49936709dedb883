"""Benchmarks of the model, its step, and what a run does beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.protocol import Benchmark, Figure, at_least, at_most


def _step(result: Any) -> Iterator[Figure]:
    for ours, theirs in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        case = f"{ours['size']}, {ours['dataset']}, batch {ours['batch']}"
        # Results of earlier revisions have the fastest step of each alone.
        own, other = (r.get("steps_s") or [r["step_s"]] for r in (ours, theirs))
        ratios = tuple(b / a for a, b in zip(own, other, strict=True))
        yield Figure(
            f"speed, {case}",
            ratios,
            "× the authors' formulation",
            at_least(1.25),
            f"{statistics.median(own):.2f} s a step",
        )
        memory = ours["peak_memory_gib"] / theirs["peak_memory_gib"]
        yield Figure(
            f"peak memory, {case}",
            (memory,),
            "× the authors' formulation",
            at_most(0.75),
            f"{ours['peak_memory_gib']:.2f} GiB",
            counted=True,
        )
        if gemm := result.get("gemm_tflops"):
            shares = tuple(ours["tflops"] * ours["step_s"] / s / gemm for s in own)
            yield Figure(
                f"matrix rate reached, {case}", shares, "× that of torch.mm", beside=f"{gemm:.3f} TFLOP/s"
            )


def _step_bottleneck(result: Any) -> str:
    rate = result["gemm_tflops"]
    # Of the median step, as the figures; ``tflops`` is of the fastest.
    ours, theirs = (
        r["tflops"] * r["step_s"] / statistics.median(r.get("steps_s") or [r["step_s"]]) / rate
        for r in result["rows"][:2]
    )
    return (
        f"matrix products: a step does its operations at {100 * ours:.0f} % of the rate of `torch.mm` on this "
        f"machine ({1e3 * rate:.0f} GFLOP/s), the authors' formulation at {100 * theirs:.0f} %. A step of matrix "
        f"products alone would be {1 / theirs:.2f} times as fast as theirs."
    )


def _operations(result: Any) -> Iterator[Figure]:
    for row in result["micro_batch"]:
        if row["bound"] is not None:
            aim = at_most(row["bound"])
            yield Figure(
                f"operations of a micro-batch, {row['name']}", (row["operations"],), "", aim, counted=True
            )


def _memory(result: Any) -> Iterator[Figure]:
    errors = tuple(100 * abs(case["error"]) for case in result)
    yield Figure(
        f"error of the estimate, largest of {len(errors)} cases",
        (max(errors),),
        "%",
        at_most(10),
        counted=True,
    )


def _overhead(result: Any) -> Iterator[Figure]:
    for name, row in result.items():
        yield Figure(
            f"training loop without the model, {name}", (row["without model"]["step_ms"],), "ms", at_most(2.0)
        )
        yield Figure(f"a log line, {name}", (100 * row["log_share"],), "% of a step", at_most(1.0))


def _tracking(result: Any) -> Iterator[Figure]:
    lost = tuple(100 * (1 - p["off"]["step_s"] / p["slow"]["step_s"]) for p in result["pairs"])
    yield Figure("throughput lost to a server that answers after 2 s", lost, "%", at_most(2.0))
    yield Figure("numbers missing on the server", (result["missing"],), "", at_most(0), counted=True)


def _predict(result: Any) -> Iterator[Figure]:
    for row in result["memory"]:
        name = f"{row['side']} × {row['side']} pixels"
        yield Figure(f"peak memory of a process, {name}", (row["peak_gib"],), "GiB", at_most(2.0))
        yield Figure(f"time of a window, {name}", (row["seconds"] / row["windows"],), "s")


def _round_trip(result: Any) -> Iterator[Figure]:
    conversions = [c for model in result["models"] for c in model["conversions"]]
    peak = max(c["ratio"] for c in conversions)
    yield Figure(
        "peak memory of a conversion, largest", (peak,), "× the checkpoint", at_most(result["limit"])
    )


_SMALL = ("--set", "train.global_batch=8", "train.micro_batch=8", "data.lanes=1")


def _inference(result: Any) -> Iterator[Figure]:
    for name, title in (("embed", "embedding"), ("encode", "encoding"), ("predict", "prediction of maps")):
        rounds = result[name]["rounds"]
        alone = f"forward pass: {statistics.median(r['forward_s'] for r in rounds):.1f} s"
        clock = tuple(r["ratio"] for r in rounds)
        yield Figure(f"time of {title}", clock, "× forward pass", at_most(1.3), alone)
        yield Figure(f"processor time of {title}", tuple(r["processor_ratio"] for r in rounds), "×")
    few, many = (result["peak_mib"][share] for share in ("4", "1"))
    yield Figure(
        "memory of a process that embeds 4 times as many tiles",
        (many / few,),
        "×",
        at_most(1.1),
        f"{many:.0f} MiB",
    )


BENCHMARKS = (
    Benchmark(
        "step",
        "A training step on CPU",
        ("benchmarks/step.py", "--out={out}"),
        _step,
        "Masks, forward, backward and AdamW of the same parameters, in our formulation and in the "
        "authors' (MAE, loss, AdamW "
        "as released; `benchmarks/reference_step.py`), by turns in one process; fp32, two threads.",
        _step_bottleneck,
        minutes=3,
    ),
    Benchmark(
        "operations",
        "Operations of a step",
        ("-m", "benchmarks.operations", "--out={out}"),
        _operations,
        "Dispatched operations, each at least one kernel launch on a GPU. The bound is 70 % of those "
        "before the step was "
        "restructured ([model.md](model.md)).",
        "the number of blocks: a block's operations are fixed.",
        minutes=2,
    ),
    Benchmark(
        "memory",
        "Estimates of memory",
        ("-m", "benchmarks.memory", "--out={out}"),
        _memory,
        "The estimate of `plan` and `train.micro_batch: auto` beside bytes counted on tensors without "
        "data, for three sizes, "
        "two presets and three kinds of checkpointing.",
        minutes=3,
    ),
    Benchmark(
        "predict",
        "Maps of scenes",
        ("-m", "benchmarks.predict", "--work={work}", "--side", "1024", "2048"),
        _predict,
        "`maestro-scale predict` with an encoder with random weights and a head of 19 classes, windows of "
        "512 × 512 pixels.",
        "the encoder: reading and blending take little beside it "
        "([the forward pass alone](#embedding-evaluation-and-prediction)).",
        minutes=4,
    ),
    Benchmark(
        "inference",
        "Embedding, evaluation and prediction",
        ("-m", "benchmarks.inference", "--work={work}", "--out={out}"),
        _inference,
        "`maestro-scale embed`, the encoding of a split for kNN, probes and attentive heads, and "
        "`maestro-scale predict` on synthetic shards, with the smallest network (the larger it is, the less "
        "the rest counts), one thread and one loader process, beside the forward pass of the same batches "
        "from memory.",
        "the forward pass; beside it reading and cropping, which for embedding and encoding another process "
        "does.",
        minutes=6,
        folder="loader",
    ),
    Benchmark(
        "overhead",
        "Training loop and log",
        ("-m", "benchmarks.overhead", "--work={work}"),
        _overhead,
        "The unmodified trainer on one batch in memory; steps with and without a log line alternate "
        "([training.md](training.md)).",
        "DeepSpeed's own step, and the reading of the loss from the device.",
        minutes=5,
    ),
    Benchmark(
        "tracking",
        "A slow MLflow server",
        ("-m", "benchmarks.tracking", "--work={work}", "--recipe=recipes/vitt.yaml", "--steps=40", *_SMALL),
        _tracking,
        "Runs without tracking and with a server that answers after 2 s, in pairs ([mlflow.md](mlflow.md)).",
        "nothing in the step: numbers are sent by a thread of their own.",
        minutes=6,
    ),
    Benchmark(
        "round_trip",
        "Conversion of checkpoints",
        ("-m", "benchmarks.round_trip"),
        _round_trip,
        "Base-size models to the authors' format and back ([models.md](models.md)).",
        "the file itself: its mapped pages count as memory.",
        minutes=8,
        by_default=False,
    ),
)
