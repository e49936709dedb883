"""Every path and every name of the code that README.md and docs/*.md mention exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "maestro_scale|recipes|slurm|docker|benchmarks|docs|tests"  # of the checkout
PACKAGES = "|".join(p.parent.name for p in (ROOT / "maestro_scale").glob("*/__init__.py"))

LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
IN_CHECKOUT = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*[\w*/]")
IN_PACKAGE = re.compile(rf"`((?:{PACKAGES})/(?:[\w/]+\.py|(?:\w+/)*))(?=[:`])")
MODULE = re.compile(r"`(\w+\.py)(?=[:`])")
NAME = re.compile(r"`([\w/]+\.py)(?::|::)(\w[\w.]*)`")


def paths(text: str) -> Iterator[str]:
    """Paths from the root of the checkout. ``A`` or ``B`` as a part of a name stand for any name."""
    for path in IN_CHECKOUT.findall(text):
        yield re.sub(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", "*", path)
    for path in (*IN_PACKAGE.findall(text), *MODULE.findall(text)):
        yield f"maestro_scale/{path}"


def defined(path: Path) -> set[str]:
    """Names that a module defines at its top level, and members of its classes as ``Class.member``."""

    def names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + t.id for t in targets if isinstance(t, ast.Name))

    return set(names(ast.parse(path.read_text()).body))


def missing(page: Path, text: str) -> list[str]:
    """What a page mentions and the checkout does not have."""
    wrong = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    wrong += [path for path in paths(text) if not list(ROOT.glob(path))]
    for path, name in NAME.findall(text):
        file = ROOT / path if path.startswith("tests/") else ROOT / "maestro_scale" / path
        file = file if file.exists() else ROOT / path
        if not file.exists() or name not in defined(file):
            wrong.append(f"{path}:{name}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_names_exist(page):
    assert missing(page, page.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "`training/no_such_file.py`",
        "`training/no_such_folder/`",
        "`no_such_module.py`",
        "`training/trainer.py:no_such_name`",
        "`training/trainer.py:Trainer.no_such_method`",
        "`tests/test_docs_paths.py::test_that_is_missing`",
        "[text](no_such_page.md)",
        "    deepspeed maestro_scale/train.py --recipe recipes/no_such_recipe.yaml",
        "`recipes/no_such_folder/B.yaml`",
    ],
)
def test_what_does_not_exist_is_found(text):
    assert len(missing(ROOT / "docs" / "page.md", text)) == 1


def test_what_exists_is_accepted():
    text = (
        "`training/trainer.py:Trainer._step`, `training/hooks/`, `maestro_scale/entry.py:USAGE`, `entry.py`, "
        "`recipes/cross/A_to_B.yaml`, [recipe](../recipes/vitl.yaml), `model/sizes.py:SIZES`"
    )
    assert missing(ROOT / "docs" / "page.md", text) == []


def test_the_page_on_the_architecture_names_modules_of_every_layer():
    named = {path.split("/")[0] for path, _ in NAME.findall((ROOT / "docs/architecture.md").read_text())}
    assert {"datasets", "shards", "stream", "model", "recipe", "training", "evaluation", "tracking"} <= named
