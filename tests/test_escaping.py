"""Escaped names: distinct, harmless in their target, and unchanged where they were harmless before."""

from __future__ import annotations

import itertools
import logging
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from testkit.hostile import NAMES

from maestro_scale.entry import USAGE, run_command
from maestro_scale.errors import MaestroError
from maestro_scale.escaping import (
    console_text,
    file_name,
    ignores_case,
    link_target,
    markdown_text,
    mlflow_key,
    mlflow_keys,
    plot_text,
    printable,
    python_command,
    shell_command,
)

SUFFIX = ".0.s2.tif"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("field-000", "field-000"),
        ("Abies_alba.v1~2", "Abies_alba.v1~2"),
        ("32TPN/0042", "32TPN%2F0042"),
        ("../../x", "%2E.%2F..%2Fx"),
        ("..", "%2E."),
        ("-rf", "%2Drf"),
        ("con", "%63on"),
        ("console", "console"),
        ("a%2Fb", "a%252Fb"),
        ("é", "%C3%A9"),
        ("", "%"),
    ],
)
def test_file_names_are_readable(key, name):
    assert file_name(key) == name
    assert file_name(key, SUFFIX) == name + SUFFIX


def test_file_names_are_distinct_components_and_can_be_created(tmp_path):
    shortened = file_name("x" * 300, SUFFIX)
    assert len(shortened) == 255
    # The name of a long key as a key of its own, and keys that differ only after the cut.
    keys = [*NAMES, "\ud800", "", shortened.removesuffix(SUFFIX), "x" * 299, "x" * 300 + "y", "é" * 201]
    names = [file_name(key, SUFFIX) for key in keys]
    assert len(set(names)) == len(keys)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("")
        assert name.isascii()
        assert name[0] not in ".-"
        assert name.endswith(SUFFIX)
        assert len(name) <= 255
    assert {p.name for p in folder.iterdir()} == set(names)
    assert list(tmp_path.iterdir()) == [folder]


def test_file_names_differ_in_more_than_case_where_it_is_ignored(tmp_path, monkeypatch):
    keys = ["a", "A", "é", "É", "%c3%89", "Tile", "tILE"]
    assert file_name("a", ".tif", ignore_case=True) == "a.tif"
    assert len({file_name(k, ".tif", ignore_case=True).lower() for k in keys}) == len(keys)
    assert not ignores_case(tmp_path)
    monkeypatch.setattr("os.path.exists", lambda path: Path(path).name.startswith(".CASE-A"))
    assert ignores_case(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_words_of_a_command_stay_words(tmp_path):
    names = [n for n in NAMES if "\x00" not in n]
    command = shell_command("printf", "%s\\0", *names)
    assert shlex.split(command) == ["printf", "%s\\0", *names]
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split("\0")[:-1] == [n.replace("\r\n", "\n") for n in names]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_links_have_no_scheme_and_stay_in_their_attribute(name):
    assert not set(link_target(name)) & set(":\"'<>?#\n ")
    assert not link_target(name).startswith("//")
    assert link_target("//host/x") == "/host/x"
    assert link_target("results/a b.json") == "results/a%20b.json"


@pytest.mark.parametrize("name", NAMES)
def test_a_table_cell_of_markdown_is_one_cell(name):
    cell = markdown_text(name)
    assert cell.isprintable()
    for i, character in enumerate(cell):
        if character in "|`<[]*$":
            assert cell[i - 1] == "\\", cell
    assert cell.replace("\\", "") == printable(name).replace("\\", "")


def test_markdown_that_means_nothing_is_not_escaped():
    text = "naip from s2_naip (base), step 500 + 3 - 80 %!"
    assert markdown_text(text) == text
    assert markdown_text("_a_ __b__ c_") == r"\_a\_ \_\_b\_\_ c\_"


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_shows_the_name(name):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar([0], [1], label=plot_text(name))
    legend = axes.legend()
    (text,) = legend.get_texts()
    assert (
        text._preprocess_math(text.get_text())
        == (  # what is drawn: no mathtext, the dollar signs themselves
            (printable(name) if len(printable(name)) <= 80 else printable(name)[:79] + "…").join(
                (" " if name.startswith("_") else "", "")
            ),
            False,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks
        figure.canvas.draw()


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_gets_no_control_character(name):
    shown = printable(name)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2028" for c in shown)
    assert printable("Zürich 水田 ± 0.2") == "Zürich 水田 ± 0.2"
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\nb\\u202e"


@pytest.mark.parametrize("name", NAMES)
def test_rich_shows_the_name_without_markup(name):
    from rich.console import Console
    from rich.table import Table

    console = Console(width=2000, color_system=None)
    table = Table("name", box=None, pad_edge=False)
    table.add_row(console_text(f"{name} :smile:"))
    with console.capture() as captured:
        console.print(table)
    assert captured.get().splitlines()[1].rstrip() == printable(f"{name} :smile:").rstrip()


def test_python_commands_keep_their_quotes(tmp_path):
    code = r"""print('a "b" $HOME `id` \ c')"""
    done = subprocess.run(
        python_command(code).replace("python", sys.executable, 1),
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == 'a "b" $HOME `id` \\ c\n'


def test_errors_and_warnings_have_no_control_characters(capsys, monkeypatch):
    def fail() -> None:
        logging.getLogger("maestro_scale.test").warning("tile %s", "\x1b[2J")
        raise MaestroError("tile \x1b[2J\nsecond line")

    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as without pytest: the handler of last resort
    assert run_command(fail) == USAGE
    assert capsys.readouterr().err == "tile \\x1b[2J\nerror: tile \\x1b[2J\nsecond line\n"


def test_keys_of_mlflow_are_accepted_and_distinct():
    from mlflow.utils.validation import _validate_metric, _validate_param, _validate_tag

    names = [f"eval/class/{n}" for n in NAMES] + list(NAMES) + ["a_b", "a|b", "a_b_", "x" * 301]
    keys = mlflow_keys(names)
    assert len(set(keys.values())) == len(set(names))
    for key in itertools.chain(keys.values(), map(mlflow_key, names)):
        _validate_metric(key, 0.5, 1, 1)
        _validate_param(key, "value")
        _validate_tag(key, "value")
        assert len(key) <= 250
    assert mlflow_key("data.mixture[0].shards") == "data.mixture_0_.shards"
    assert mlflow_key("loss/s2_10m") == "loss/s2_10m"
    assert mlflow_keys(["a|b", "a_b"])["a|b"] == "a_b"
