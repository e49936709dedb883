"""``python -m benchmarks``: the page is what the recorded results give, and --check fails where an aim is missed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import __main__ as runner
from benchmarks.catalogue import BENCHMARKS, FURTHER
from benchmarks.page import figures_table, render
from benchmarks.protocol import Benchmark, Figure, at_least, at_most, number
from benchmarks.record import run_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    monkeypatch.setenv("MAESTRO_DATA", "/nowhere")


def test_the_page_is_what_the_recorded_results_give():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page == render(BENCHMARKS, runner.RESULTS, FURTHER), "run python -m benchmarks --page"


def test_the_readme_has_the_recorded_ratios_of_the_loader():
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if "benchmarks loader`" in line)
    microseconds = json.loads((runner.RESULTS / "loader.json").read_text())["cpu_us_per_sample"]
    for dataset, name in (("treesatai_ts", "TreeSatAI-TS"), ("flair_hub", "FLAIR-HUB")):
        pairs = zip(microseconds[dataset]["authors' files"], microseconds[dataset]["ours, raw"], strict=True)
        low, median, high = sorted(theirs / ours for theirs, ours in pairs)
        assert f"{number(median)} × [{number(low)}–{number(high)}] on {name}" in row


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)
def test_a_declared_command_exists(benchmark):
    first, *rest = benchmark.command
    path = f"{rest[0].replace('.', '/')}.py" if first == "-m" else first
    assert (ROOT / path).exists()
    result = runner.RESULTS / f"{benchmark.name}.json"
    if result.exists():
        list(benchmark.figures(json.loads(result.read_text())))


def made_up(write: str = "") -> Benchmark:
    """A benchmark whose command is a line of Python."""
    return Benchmark(
        "made_up",
        "Made up",
        ("-c", write, "{out}"),
        lambda result: [Figure("time", tuple(result["times"]), "s", at_most(2.0), "bound 1 s")],
        "How.",
        "the disk.",
    )


@pytest.mark.parametrize(
    ("times", "code", "line"),
    [([1, 2, 9], 0, "every aim is met"), ([1, 3, 9], 1, "missed: made_up: time: 3 s")],
)
def test_check_fails_on_a_missed_aim(tmp_path, capsys, times, code, line):
    (tmp_path / "made_up.json").write_text(json.dumps({"times": times}))
    arguments = ["--recorded", "made_up"]
    assert runner.main([*arguments, "--check"], [made_up()], tmp_path) == code
    assert line in capsys.readouterr().out
    assert runner.main(arguments, [made_up()], tmp_path) == 0  # without --check a missed aim is only printed


def test_a_run_writes_its_result_and_how_it_was_recorded(tmp_path):
    benchmark = made_up("import sys; open(sys.argv[1], 'w').write('{\"times\": [4.5]}')")
    assert runner.main(["--check", "--work", str(tmp_path)], [benchmark], tmp_path) == 1
    run = run_of(tmp_path, "made_up")
    assert run.command.startswith("python -c")
    assert run.cores == os.cpu_count()
    (tmp_path / "made_up.json").write_text('{"times": [1]}')  # by another command
    assert run_of(tmp_path, "made_up") is None


def test_further_options_are_of_one_benchmark(tmp_path, capsys):
    benchmark = made_up("import sys; open(sys.argv[1], 'w').write('{\"times\": [%s]}' % sys.argv[2])")
    assert runner.main(["made_up", "--check", "--", "1.5"], [benchmark], tmp_path) == 0
    assert run_of(tmp_path, "made_up").command.endswith("OUT 1.5")
    with pytest.raises(SystemExit):
        runner.main(["--", "1.5"], [benchmark], tmp_path)
    assert "name it" in capsys.readouterr().err


def test_a_benchmark_that_fails_is_named_with_exit_code_2(tmp_path, capsys):
    assert runner.main([], [made_up("raise SystemExit(3)")], tmp_path) == 2
    assert "could not run: made_up" in capsys.readouterr().err


def test_the_page_of_a_result(tmp_path):
    (tmp_path / "made_up.json").write_text('{"times": [1, 3, 9], "revision": "0123456789abcdef"}')
    other = Benchmark("other", "Other", ("x.py",), page="model.md")
    page = tmp_path / "page.md"
    assert runner.main(["--page"], [made_up(), other], tmp_path, page) == 0
    text = page.read_text()
    assert "| time | 3 s | 3 [1–9] | bound 1 s | ≤ 2 s | **missed** |" in text
    assert "**Bottleneck:** the disk." in text
    assert "| [Made up](#made-up) | `made_up` | 0 of 1 | time: 3 s, aim ≤ 2 s |" in text
    assert "of revision 012345678." in text
    assert "| `other` | Other | `python x.py` | [model.md](model.md) |" in text


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["nosuch"])
    assert "no benchmark is named nosuch" in capsys.readouterr().err


def test_figures():
    assert Figure("a", (3.0, 1.0, 2.0), aim=at_least(2.0)).met is True
    assert Figure("a", (3.0, 1.0, 1.9), aim=at_least(2.0)).met is False
    assert "| a * |" in figures_table([Figure("a", (1.0, 2.0))])  # of two runs
    assert "| a | 7  | count |" in figures_table([Figure("a", (7,), counted=True)]).replace("7 |", "7  |")
    assert [number(v) for v in (0, 0.01234, 1.2345, 12.345, 1234.5, -0.5)] == [
        "0",
        "0.012",
        "1.23",
        "12.3",
        "1,234",
        "-0.5",
    ]
