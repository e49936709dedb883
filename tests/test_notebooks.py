"""The notebooks of docs/notebooks run from their first cell to their last, each in an empty folder."""

from __future__ import annotations

import json
import shutil

import pytest
from testkit.page_blocks import ROOT
from testkit.page_shell import Shell

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    pytest.importorskip("nbclient", reason="needs the test extra")
    shutil.copy(path, tmp_path)
    # A cell that raises, or whose commands fail, is an error of the whole.
    Shell(tmp_path, {"IPYTHONDIR": str(tmp_path / "ipython")}).run(f"jupyter execute {path.name}", 300)


@pytest.mark.slow
def test_a_cell_whose_command_fails_is_noticed(tmp_path):
    pytest.importorskip("nbclient", reason="needs the test extra")
    content = json.loads(NOTEBOOKS[0].read_text())
    (cell, *_) = (c for c in content["cells"] if c["cell_type"] == "code")
    cell["source"] = ["%%script bash -e\n", "maestro-scale verify no_such_folder\n", "true"]
    (tmp_path / "wrong.ipynb").write_text(json.dumps({**content, "cells": [cell]}))
    with pytest.raises(AssertionError, match="no_such_folder"):
        Shell(tmp_path).run("jupyter execute wrong.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert cells
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in cells)
    magics = [c["source"][0] for c in cells if c["source"][0].startswith(("%", "!"))]
    assert {m.strip() for m in magics} <= {"%%script bash -e"}, "other magics ignore commands that fail"
