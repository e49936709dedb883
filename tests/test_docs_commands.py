"""Every block of commands in README and docs is marked as run by a test, or says why not; all have valid options.

A marker is the line before a block: ``<!-- test: NAME -->`` or ``<!-- not run: REASON -->``. NAME is ``dry`` (needs no
data), a place of ``testkit/page_places.py``, which may have an argument, or a name of another test (``ELSEWHERE``).
The blocks of a page with the same marker run one after the other in one folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer
from testkit.page_blocks import PAGES, ROOT, Block, all_blocks, blocks
from testkit.page_places import PLACES
from testkit.page_shell import Shell
from typer.testing import CliRunner

from maestro_scale import cli, evaluate, train

ELSEWHERE = {
    "your_arrays.md": ("tests/shards/test_your_arrays.py", {"look", "train"}),
    "your_dataset.md": (
        "tests/test_your_dataset.py",
        {"make", "describe", "shard", "inspect", "recipe", "pretrain", "probe", "finetune", "map"},
    ),
}
"""Page → the test that runs its blocks by name, and their names."""
_OURS = re.compile(
    r"(?:^|[\s;('])(maestro-scale|maestro_scale\.cli|\S*evaluate\.py|\S*train\.py)\s+([^;|)#&>']+)"
)


def own_commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """(program, words) of the project's own commands in a block."""
    for line in block.commands:
        is_image = line.startswith(("docker", "apptainer"))  # maestro-scale is also the name of the image
        for program, rest in _OURS.findall(f"{line} "):
            if is_image and program == "maestro-scale":
                continue
            try:
                yield program, shlex.split(rest.replace("$(", "("))
            except ValueError:
                yield program, rest.split()


def wrong_options(program: str, words: list[str]) -> list[str]:
    """Options, or the command, that the program does not have."""
    name = (
        "train"
        if program.endswith("train.py")
        else "evaluate"
        if program.endswith("evaluate.py")
        else words[0]
    )
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    if name in ("train", "evaluate"):
        script = {"train": train, "evaluate": evaluate}[name]
        known = {"--nproc", *_script_options(script)}
    else:
        command = typer.main.get_command(cli.app).commands.get(name)
        if command is None:
            return [name]
        known = {
            o for p in command.params if isinstance(p, click.Option | typer.core.TyperOption) for o in p.opts
        }
        known |= {o for p in command.params for o in p.secondary_opts}
    return [option for option in given if option not in known | {"--help"}]


def _script_options(script: ModuleType) -> set[str]:
    """Options of train.py or evaluate.py, from their help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        script.parse(["--help"])
    return set(re.findall(r"--[\w-]+", text.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_whether_it_is_run(page):
    found = [(f"{page.name}:{b.line + 1}: {b.commands[0]}", b.marker) for b in blocks(page.read_text())]
    assert [place for place, marker in found if marker is None] == [], "write a marker before it"
    run_here = {"dry", *PLACES}
    names = {marker[1] for _, marker in found if marker[0] == "test"}
    unknown = {name for name in names if name.split()[0] not in run_here}
    test, known = ELSEWHERE.get(page.name, ("", set()))
    assert unknown <= known
    assert not test or page.name in (ROOT / test).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page):
    wrong = {
        f"{page.name}:{block.line + 1}": found
        for block in blocks(page.read_text())
        for program, words in own_commands(block)
        if words and (found := wrong_options(program, words))
    }
    assert wrong == {}


def marked(name: str) -> Iterator[tuple[Path, Block]]:
    """The blocks whose marker begins with ``name``."""
    return (
        (page, b) for page, b in all_blocks() if b.marker and b.marker[0] == "test" and b.marker[1] == name
    )


DRY = [(f"{page.name}:{b.line + 1}", b) for page, b in marked("dry")]


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for _, b in DRY], ids=[place for place, _ in DRY])
def test_a_block_that_needs_no_data_runs(block, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for program, words in own_commands(block):
        if "train" in (words[0], Path(program).stem):
            assert train.main(words[words[0] == "train" :]) == 0, capsys.readouterr().err
        else:
            done = CliRunner().invoke(cli.app, words)
            assert done.exit_code == 0, done.output


HERE = sorted(
    {
        (page.name, b.marker[1])
        for page, b in all_blocks()
        if b.marker and b.marker[0] == "test" and b.marker[1].split()[0] in PLACES
    }
)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Callable[[str], Shell]:
    """The shell of a marker, whose folder is prepared once."""

    @functools.cache
    def prepare(marker: str) -> Shell:
        place, *argument = marker.split()
        return PLACES[place](tmp_path_factory.mktemp("place"), *argument)

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize(("page", "marker"), HERE, ids=[" ".join(pair) for pair in HERE])
def test_the_blocks_of_a_page_run_in_order(page, marker, prepared, tmp_path):
    shell = prepared(marker)
    if shell.folder != ROOT:
        shutil.copytree(shell.folder, tmp_path / "place", symlinks=True)
        shell = dataclasses.replace(shell, folder=tmp_path / "place")
    for path, block in marked(marker):
        if path.name == page:
            shell.run("\n".join(block.commands))


@pytest.mark.slow
def test_a_command_that_fails_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="no_such_folder"):
        Shell(tmp_path).run("maestro-scale verify no_such_folder > found.txt\ntrue")
    with pytest.raises(AssertionError, match="NO_SUCH"):
        Shell(tmp_path).run("echo $NO_SUCH")


@pytest.mark.slow
def test_a_command_has_the_folder_the_variables_and_the_outputs_of_its_line(tmp_path):
    (tmp_path / "sub").mkdir()
    Shell(tmp_path, {"MAESTRO_DATA": "here"}).run(
        "cd sub && maestro-scale recipes > list.txt && deepspeed --num_gpus 8 maestro_scale/train.py --help > help.txt"
    )
    assert "vitl" in (tmp_path / "sub" / "list.txt").read_text()
    assert "--recipe" in (tmp_path / "sub" / "help.txt").read_text()


def test_blocks_are_found_and_what_is_wrong_with_them():
    text = (
        "Text:\n\n<!-- not run: why -->\n\n    maestro-scale train --recipe x \\\n        --nosuch 3\n\nMore\n\n"
        "```\nmaestro-scale nosuch\n```\n"
    )
    first, second = blocks(text)
    assert (first.line, first.marker) == (4, ("not run", "why"))
    assert second.marker is None
    assert [wrong_options(*c) for c in own_commands(first)] == [["--nosuch"]]
    assert [wrong_options(*c) for c in own_commands(second)] == [["nosuch"]]
