"""What a benchmark declares: its command, and how its recorded result becomes the figures of docs/performance.md."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MIN_RUNS = 3


@dataclass(frozen=True)
class Aim:
    """A bound: the value of a figure is ``at`` most or at least ``bound``."""

    at: Literal["most", "least"]
    bound: float

    def met_by(self, value: float) -> bool:
        """Whether a value keeps the bound."""
        return value <= self.bound if self.at == "most" else value >= self.bound


def at_most(bound: float) -> Aim:
    """The aim that a figure is not above ``bound``."""
    return Aim("most", bound)


def at_least(bound: float) -> Aim:
    """The aim that a figure is not below ``bound``."""
    return Aim("least", bound)


@dataclass(frozen=True)
class Figure:
    """One line of the page.

    ``runs``: the value in each run; a ratio is of two values of the same run. ``unit``: after the value (``%``,
    ``MB/s``, ``×``). ``beside``: the lower bound or the peer that the value is compared with, and its own value.
    ``counted``: the value is a count, which is the same in every run.
    """

    name: str
    runs: tuple[float, ...]
    unit: str = ""
    aim: Aim | None = None
    beside: str = ""
    counted: bool = False

    @property
    def value(self) -> float:
        """The median over the runs."""
        return statistics.median(self.runs)

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the aim; None without an aim."""
        return None if self.aim is None else self.aim.met_by(self.value)

    @property
    def enough(self) -> bool:
        """Whether the spread is known: a count, or at least ``MIN_RUNS`` runs."""
        return self.counted or len(self.runs) >= MIN_RUNS


@dataclass(frozen=True)
class Benchmark:
    """One entry of the catalogue.

    Args:
        name: on the command line; the result is benchmarks/results/NAME.json.
        title: of its section.
        command: words after ``python``. ``{work}`` stands for a folder of its own that is kept, ``{out}`` for the file
            of the result, ``{venv}`` for an environment in which it installs other projects' loaders.
        figures: the figures of a recorded result (parsed JSON).
        method: what is measured, in a few sentences.
        bottleneck: what limits the figures; a sentence, or a function of the result.
        notes: further paragraphs or tables (Markdown) from the result, e.g. what each peer does.
        page: another page that has its results; empty: docs/performance.md.
        minutes: about how long it takes on two cores.
        folder: name of its folder in WORK; default: its name. Two that need the same data can share one.
        by_default: whether ``python -m benchmarks`` without names runs it. False where it needs data, a GPU or hours.
    """

    name: str
    title: str
    command: tuple[str, ...]
    figures: Callable[[Any], Iterable[Figure]] = lambda result: ()
    method: str = ""
    bottleneck: str | Callable[[Any], str] = ""
    notes: Callable[[Any], str] = lambda result: ""
    page: str = ""
    minutes: float = 1.0
    folder: str = ""
    by_default: bool = True

    def words(self, work: str, out: str, venv: str) -> list[str]:
        """The command with its folders."""
        folders = {"{work}": work, "{out}": out, "{venv}": venv}
        return [re.sub(r"\{(work|out|venv)\}", lambda m: folders[m[0]], word) for word in self.command]

    def shown(self) -> str:
        """The command as a user types it."""
        return " ".join(("python", *self.words("WORK", "OUT", "VENV")))


def missed(figures: Sequence[Figure]) -> list[str]:
    """One line for each figure that misses its aim."""
    return [
        f"{f.name}: {number(f.value)}{_unit(f)}, the aim is at {f.aim.at} {number(f.aim.bound)}{_unit(f)}"
        for f in figures
        if f.aim is not None and not f.met
    ]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _unit(figure: Figure) -> str:
    return f" {figure.unit}" if figure.unit else ""
