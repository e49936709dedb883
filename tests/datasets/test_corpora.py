"""The descriptions of public corpora: valid, found after an installation, and on docs/corpora.md."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from maestro_scale.datasets.description.config import Description
from maestro_scale.recipe import load_recipe
from maestro_scale.strict_yaml.loading import validated
from maestro_scale.strict_yaml.merge import read_tree
from maestro_scale.training.dry_run import dry_run

REPO = Path(__file__).parents[2]
DESCRIPTIONS = sorted((REPO / "descriptions").glob("*.yaml"))


@pytest.mark.parametrize("path", DESCRIPTIONS, ids=lambda path: path.stem)
def test_description_is_valid(path):
    description = validated(read_tree(path, (), "description"), Description)
    # ssl4eo_s12_zarr is another version of a dataset: it keeps the name of it, as its shards fit the same recipe.
    assert path.stem.removesuffix("_zarr") == description.name


def test_page_lists_every_description():
    page = (REPO / "docs" / "corpora.md").read_text()
    for path in DESCRIPTIONS:
        assert f"| [`{path.stem}`](#" in page


def test_pip_installs_the_descriptions():
    assert (
        '"share/maestro_scale/descriptions" = ["descriptions/*.yaml"]'
        in (REPO / "pyproject.toml").read_text()
    )


@pytest.mark.parametrize("name", ["terramesh", "ssl4eo_s12"])
def test_dry_run_of_a_recipe_needs_no_data(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MAESTRO_DATA", str(tmp_path))
    output = io.StringIO()
    dry_run(load_recipe(REPO / "recipes" / f"{name}.yaml"), 8, Console(file=output, width=110))
    for words in ("s2", "s1_grd", "dem", "parameters", "GFLOP", "GiB per rank"):
        assert words in output.getvalue()
