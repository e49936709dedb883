"""The table of all benchmarks. One entry here, and a benchmark is run, checked and on the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.catalogue import data, loading, model, other, scale
from benchmarks.catalogue.demand import node_demand
from benchmarks.protocol import Benchmark

BENCHMARKS: tuple[Benchmark, ...] = (
    *loading.BENCHMARKS,
    *data.BENCHMARKS,
    *scale.BENCHMARKS,
    *model.BENCHMARKS,
    *other.BENCHMARKS,
)

FURTHER: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"loader": node_demand}
