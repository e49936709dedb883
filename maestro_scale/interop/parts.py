"""Which parts of a model came from where: taken over, resized, left fresh, or left behind, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

Fate = Literal["taken", "resized", "fresh", "left behind"]


@dataclass(frozen=True)
class Part:
    """A few parameters with one fate. ``name``: e.g. ``encoders.s2``; ``why`` where it is not plainly taken."""

    name: str
    fate: Fate
    num_tensors: int
    num_values: int
    why: str = ""


def summarise(fates: Iterable[tuple[str, Fate, int, str]]) -> tuple[Part, ...]:
    """Parameters (name, fate, number of values, why) by part and fate, in order."""
    merged: dict[tuple[str, Fate, str], tuple[int, int]] = {}
    for name, fate, values, why in fates:
        key = (part_of(name), fate, why)
        tensors, total = merged.get(key, (0, 0))
        merged[key] = (tensors + 1, total + values)
    return tuple(Part(n, fate, t, v, why) for (n, fate, why), (t, v) in merged.items())


def part_of(parameter: str) -> str:
    """``encoders.s2.blocks.0.up.weight`` -> ``encoders.s2``."""
    first, second, *_ = (*parameter.split("."), "")
    return first if second in ("", "blocks", "layers", "norm") else f"{first}.{second}"


def table(parts: Iterable[Part], title: str) -> Table:
    """One row per part, for a terminal."""
    found = Table(title=title, title_justify="left")
    for column in ("part", "", "tensors", "parameters", "why"):
        found.add_column(column, justify="right" if column in ("tensors", "parameters") else "left")
    for p in parts:
        found.add_row(p.name, p.fate, str(p.num_tensors), f"{p.num_values:,}", p.why)
    return found
