"""Every block of commands in README and docs is marked as run by a test, or says why not; all have valid options.

A marker is the line before a block: ``<!-- test: NAME -->`` or ``<!-- not run: REASON -->``. Two NAMEs are
run here: ``dry``, which needs no data, and ``fixture``, on the shards, run and model of tests/fixtures.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer
from typer.testing import CliRunner

from maestro_scale import cli, evaluate, train
from maestro_scale.training.stop import StopRequest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    *(
        "maestro-scale",
        "deepspeed",
        "torchrun",
        "python",
        "python3",
        "pip",
        "sbatch",
        "srun",
        "bash",
        "docker",
    ),
    *("apptainer", "git", "hf", "mlflow", "evaluate.py", "train.py"),
)
_COMMAND = re.compile(rf"^(?:[A-Z_]+=\S+ )*(?:{'|'.join(map(re.escape, PROGRAMS))}) ")
_OURS = re.compile(
    r"(?:^|[\s;('])(maestro-scale|maestro_scale\.cli|\S*evaluate\.py|\S*train\.py)\s+([^;|)#&>']+)"
)
_MARKER = re.compile(r"<!-- (test|not run): (.+) -->")


@dataclass(frozen=True)
class Block:
    """``line``: number of its first line, from 0; ``marker``: (kind, name or reason), None where it has none."""

    line: int
    commands: tuple[str, ...]
    marker: tuple[str, str] | None


def blocks(text: str) -> Iterator[Block]:
    """Indented and fenced blocks with at least one command of a program that the project documents."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        start, body = number, []
        if lines[number].lstrip().startswith("```"):
            number += 1
            while number < len(lines) and not lines[number].lstrip().startswith("```"):
                body.append(lines[number])
                number += 1
            number += 1
        elif lines[number].startswith("    ") and not (start and lines[start - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                body.append(lines[number])
                number += 1
        else:
            number += 1
            continue
        joined = "\n".join(line.strip() for line in body).replace("\\\n", " ").splitlines()
        if any(_COMMAND.match(line.removeprefix("env/bin/")) for line in joined):
            yield Block(start, tuple(line for line in joined if line), _marker_before(lines, start))


def _marker_before(lines: list[str], start: int) -> tuple[str, str] | None:
    before = next((line for line in reversed(lines[:start]) if line.strip()), "")
    found = _MARKER.fullmatch(before.strip())
    return (found[1], found[2]) if found else None


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


def all_blocks() -> list[tuple[str, Block]]:
    return [(page.name, block) for page in PAGES for block in blocks(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_whether_it_is_run(page):
    silent = [
        f"{page.name}:{b.line + 1}: {b.commands[0]}" for b in blocks(page.read_text()) if b.marker is None
    ]
    assert silent == [], "write <!-- test: NAME --> or <!-- not run: REASON --> before it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page):
    wrong = {
        f"{page.name}:{block.line + 1}": found
        for block in blocks(page.read_text())
        for program, words in own_commands(block)
        if words and (found := wrong_options(program, words))
    }
    assert wrong == {}


DRY = [(f"{name}:{b.line + 1}", b) for name, b in all_blocks() if b.marker == ("test", "dry")]


@pytest.mark.parametrize("block", [b for _, b in DRY], ids=[place for place, _ in DRY])
def test_a_block_that_needs_no_data_runs(block, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for program, words in own_commands(block):
        if "train" in (words[0], Path(program).stem):
            assert train.main(words[words[0] == "train" :]) == 0, capsys.readouterr().err
        else:
            done = CliRunner().invoke(cli.app, words)
            assert done.exit_code == 0, done.output


FIXTURES = ROOT / "tests" / "fixtures"
PLACES = {
    "shards": ("SHARDS", "shards", "data/treesatai_ts"),
    "run": ("RUN", "runs/vitb-treesatai-ts"),
    "model": ("MODEL",),
    "evaluation/probe": ("ours", "theirs", "other/results"),
}
"""Of tests/fixtures: the names that the pages use for such data."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with data of all names, which is the working directory."""
    for source, names in PLACES.items():
        for name in names:
            shutil.copytree(FIXTURES / source, tmp_path / name)
    # The sensors of the small model have other patches and groups than the benchmark's recipe.
    own = f"extends: {FIXTURES / 'evaluate.yaml'}\ndata: {{cache_dir: {tmp_path / 'cache'}}}\n"
    for name in ("eval/treesatai_ts", "recipes/eval/treesatai_ts.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(own)
    monkeypatch.setenv("MAESTRO_DATA", "data")
    monkeypatch.setenv("MAESTRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("maestro_scale.launcher_death.watch_launcher", lambda *_: None)
    monkeypatch.setattr(StopRequest, "install", lambda self: self)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ON_FIXTURES = {name for name, b in all_blocks() if b.marker == ("test", "fixture")}


@pytest.mark.parametrize("page", sorted(ON_FIXTURES))
def test_the_blocks_of_a_page_run_in_order(page, folder, capsys):
    text = next(p for p in PAGES if p.name == page).read_text()
    for block in blocks(text):
        if block.marker != ("test", "fixture"):
            continue
        for program, words in own_commands(block):
            words = [os.path.expandvars(word) for word in words]
            if "evaluate" in (words[0], Path(program).stem):
                status = evaluate.main(words[words[0] == "evaluate" :])
            else:
                status = CliRunner().invoke(cli.app, words, catch_exceptions=False).exit_code
            assert status == 0, (words, capsys.readouterr().err)


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
