"""Measurements of accuracy, tests and interoperability, whose results are on other pages."""

from __future__ import annotations

from benchmarks.protocol import Benchmark

BENCHMARKS = (
    Benchmark(
        "gpu",
        "Correctness and speed on a GPU",
        ("-m", "benchmarks.gpu"),
        page="gpu.md",
        minutes=8,
        by_default=False,
    ),
    Benchmark(
        "precision",
        "Loss curves in fp32 and bf16",
        ("-m", "benchmarks.precision", "--work={work}"),
        page="model.md",
        minutes=20,
        by_default=False,
    ),
    Benchmark(
        "leak",
        "Masked pixels that reach the encoder",
        ("benchmarks/leak.py",),
        page="model.md",
        by_default=False,
    ),
    Benchmark(
        "seams",
        "Maps with windows at two places",
        ("-m", "benchmarks.seams", "--work={work}", "{work}/pastis_hd_model", "{work}/flair_hub_model"),
        page="predict.md",
        minutes=10,
        by_default=False,
    ),
    Benchmark(
        "labels",
        "Pretraining with few labels",
        ("benchmarks/labels.py", "--quickstart={work}"),
        page="evaluation.md",
        minutes=20,
        by_default=False,
    ),
    Benchmark(
        "fuel_moisture",
        "Real labels: land cover and fuel moisture",
        ("benchmarks/fuel_moisture.py", "--data=presto/fuel_moisture", "--out={work}"),
        page="evaluation.md",
        minutes=60,
        by_default=False,
    ),
    Benchmark(
        "external_baselines",
        "Encoders of torchgeo and terratorch",
        ("-m", "benchmarks.external_baselines", "--venv={venv}"),
        page="evaluation.md",
        minutes=20,
        by_default=False,
    ),
    Benchmark(
        "study_coverage",
        "Coverage of the intervals of a study",
        ("benchmarks/study_coverage.py", "--out={out}"),
        page="study.md",
        minutes=10,
        by_default=False,
    ),
    Benchmark(
        "quickstart",
        "Scores of the quickstart over seeds",
        ("benchmarks/quickstart.py", "--out={work}"),
        page="quickstart.md",
        minutes=60,
        by_default=False,
    ),
    Benchmark(
        "mutation",
        "Mutants that the tests kill",
        ("-m", "benchmarks.mutation"),
        page="../CONTRIBUTING.md",
        minutes=60,
        by_default=False,
    ),
    Benchmark(
        "coverage",
        "Branch coverage of the tests",
        ("-m", "benchmarks.coverage_run"),
        page="../CONTRIBUTING.md",
        minutes=40,
        by_default=False,
    ),
    Benchmark(
        "dependencies",
        "Oldest and newest versions of the dependencies",
        ("-m", "benchmarks.dependencies", "lowest"),
        page="../CONTRIBUTING.md",
        minutes=60,
        by_default=False,
    ),
)
