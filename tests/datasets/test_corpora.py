"""The descriptions of public corpora: valid, found after an installation, and on docs/corpora.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from maestro_scale.datasets.description.config import Description
from maestro_scale.strict_yaml.loading import validated
from maestro_scale.strict_yaml.merge import read_tree

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
