"""The recipe that ``describe --recipe`` prints is valid for the dataset and fits its size."""

from __future__ import annotations

import numpy as np
import pytest

from maestro_scale.recipe import load_recipe
from maestro_scale.recipe.draft import draft_recipe
from maestro_scale.shards import Raster, Writer, describe
from maestro_scale.shards.errors import ManifestError


def write(url, split: str, number: int, patch: int) -> None:
    spec = describe("plots", 20, [Raster("s1", ("VV",), 10, "float32", patch, num_dates=2)])
    with Writer(str(url), spec, split) as writer:
        for i in range(number):
            writer.add_arrays(
                f"{split}{i}", {"s1": np.full((2, 1, 2, 2), -12, "f4")}, {"s1": ["2020-01-01", "2020-02-01"]}
            )


@pytest.mark.parametrize(
    ("number", "patch", "batch", "target"), [(40, 2, 4, "patch_group"), (3, 1, 1, "none")]
)
def test_the_recipe_is_valid_and_its_batch_fits_the_samples(
    tmp_path, monkeypatch, number, patch, batch, target
):
    monkeypatch.setenv("MAESTRO_CACHE", "/local/cache")
    shards = tmp_path / "shards"
    write(shards, "train", number, patch)
    write(shards, "test", 1, patch)
    path = tmp_path / "recipe.yaml"
    path.write_text(draft_recipe(str(shards)))
    recipe = load_recipe(path)
    assert recipe.data.mixture[0].split == ("train",)
    assert recipe.train.global_batch == batch
    assert recipe.model.target == target
    assert recipe.data.cache_dir == "/local/cache"
    assert recipe.train.epochs * (number // batch) >= 1000


def test_shards_without_a_split_to_train_on_are_one_line(tmp_path):
    write(tmp_path / "shards", "test", 1, 2)
    with pytest.raises(ManifestError, match="only the splits test; write the split train first"):
        draft_recipe(str(tmp_path / "shards"))
