"""docs/performance.md, from the recorded results alone: the same results give the same page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.protocol import Benchmark, Figure, number
from benchmarks.record import Run, run_of

_HEAD = """<!-- Written by python -m benchmarks --page from benchmarks/results; do not edit. -->
# Performance

What was measured, on which machine, and which aims are met. A ratio is of two values of the same run, since other
processes share the machine; the table has the median of the runs and, in brackets, the lowest and highest. Figures of
fewer than three runs are marked with *, counts are the same in every run. Speed and memory on GPUs are predicted, not
measured: [gpu.md](gpu.md).

<!-- not run: benchmarks of minutes to hours -->

    python -m benchmarks                     # runs all that need no GPU and no data, and prints their figures
    python -m benchmarks loader step         # some of them
    python -m benchmarks --check             # exit code 1 where an aim is missed
    python -m benchmarks --recorded --check  # the same for the recorded results, without a run
    python -m benchmarks --page              # writes this page from the recorded results
    python -m benchmarks --list
"""


def results_of(benchmarks: Iterable[Benchmark], folder: Path) -> dict[str, Any]:
    """{name: parsed result} of the benchmarks that have one in ``folder``."""
    paths = {b.name: folder / f"{b.name}.json" for b in benchmarks}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def render(
    benchmarks: Sequence[Benchmark],
    folder: Path,
    further: Mapping[str, Callable[[Mapping[str, Any]], str]],
) -> str:
    """The page. ``further``: {benchmark: Markdown at the end of its section}, as a function of all results."""
    results = results_of(benchmarks, folder)
    here = [b for b in benchmarks if not b.page]
    parts = [_HEAD, *_summary(here, results)]
    for benchmark in here:
        parts += _section(benchmark, results.get(benchmark.name), run_of(folder, benchmark.name))
        if benchmark.name in further and benchmark.name in results:
            parts.append(further[benchmark.name](results))
    parts += _elsewhere([b for b in benchmarks if b.page])
    return "\n".join(part.strip("\n") + "\n" for part in parts if part.strip())


def _summary(benchmarks: Sequence[Benchmark], results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Aims\n"
    rows = []
    for benchmark in benchmarks:
        found = list(benchmark.figures(results[benchmark.name])) if benchmark.name in results else []
        aimed = [f for f in found if f.aim is not None]
        met = sum(bool(f.met) for f in aimed)
        link = f"[{benchmark.title}](#{_anchor(benchmark.title)})"
        rows.append(
            (
                link,
                f"`{benchmark.name}`",
                f"{met} of {len(aimed)}" if found else "not measured",
                _worst(aimed),
            )
        )
    yield table(("section", "name", "aims met", "furthest from its aim"), rows)


def _worst(figures: Sequence[Figure]) -> str:
    wrong = [f for f in figures if f.aim is not None and not f.met]
    if not wrong:
        return ""
    worst = max(wrong, key=_distance)
    return f"{worst.name}: {_value(worst)}, aim {_aim(worst)}"


def _distance(figure: Figure) -> float:
    assert figure.aim is not None
    bound, value = figure.aim.bound, figure.value
    if min(abs(bound), abs(value)) == 0:
        return float("inf")
    return value / bound if figure.aim.at == "most" else bound / value


def _section(benchmark: Benchmark, result: Any, run: Run | None) -> Iterator[str]:
    yield f"## {benchmark.title}\n"
    yield benchmark.method
    yield f"<!-- not run: a benchmark -->\n\n    {run.command if run else benchmark.shown()}"
    if result is None:
        yield "Not measured yet."
        return
    yield figures_table(benchmark.figures(result))
    yield benchmark.notes(result)
    text = benchmark.bottleneck if isinstance(benchmark.bottleneck, str) else benchmark.bottleneck(result)
    if text:
        yield f"**Bottleneck:** {text}"
    yield f"Result: [{benchmark.name}.json](../benchmarks/results/{benchmark.name}.json)" + (
        f". {run.described()}" if run else _from_result(result)
    )


def _from_result(result: Any) -> str:
    revision = result.get("revision") if isinstance(result, dict) else None
    return f", of revision {revision[:9]}." if revision else "."


def _elsewhere(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    yield "## Other measurements\n\nOf accuracy, tests and interoperability, described where they matter.\n"
    yield table(
        ("name", "what", "command", "page"),
        [
            (f"`{b.name}`", b.title, f"`{b.shown()}`", f"[{b.page.partition('#')[0]}]({b.page})")
            for b in benchmarks
        ],
    )


def figures_table(figures: Iterable[Figure]) -> str:
    """Markdown table of figures."""
    rows = [
        (
            f.name + ("" if f.enough else " *"),
            _value(f),
            _spread(f),
            f.beside,
            _aim(f),
            "" if f.met is None else "met" if f.met else "**missed**",
        )
        for f in figures
    ]
    return table(("figure", "median", "runs", "beside it", "aim", ""), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _value(figure: Figure) -> str:
    return f"{number(figure.value)} {figure.unit}".strip()


def _spread(figure: Figure) -> str:
    if figure.counted:
        return "count"
    return f"{len(figure.runs)} [{number(min(figure.runs))}–{number(max(figure.runs))}]"


def _aim(figure: Figure) -> str:
    if figure.aim is None:
        return ""
    return f"{'≤' if figure.aim.at == 'most' else '≥'} {number(figure.aim.bound)} {figure.unit}".strip()


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
