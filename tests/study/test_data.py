"""The synthetic data of a study: exact numbers of tiles by split, written once."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from maestro_scale import datasets
from maestro_scale.datasets.pastis_hd.synth import Windows
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.datasets.synthetic.scene import Scene
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.study import data as study_data
from maestro_scale.study.config import Data


def test_every_split_has_its_number_of_tiles(tmp_path):
    data = Data(dataset="treesatai_ts", tiles={"train": 2, "val": 1, "test": 4}, seed=1)
    assert not study_data.is_complete(data, tmp_path)
    study_data.write(data, tmp_path, workers=1)
    shards = study_data.place(data, tmp_path)
    manifest = Manifest.load(shards)
    assert {s: sum(x.samples for x in manifest.shards_of([s])) for s in ("train", "val", "test")} == dict(
        data.tiles
    )
    assert manifest.synthetic  # else results would be compared with published numbers
    assert study_data.is_complete(data, tmp_path)
    assert [p.name for p in (tmp_path / "data").iterdir() if p.name.endswith(".raw")] == []
    study_data.write(data, tmp_path)  # nothing to do


def test_a_kill_after_the_last_file_leaves_no_raw_tiles_after_the_next_start(tmp_path, monkeypatch):
    data = Data(dataset="treesatai_ts", tiles={"train": 7}, seed=1)
    monkeypatch.setattr(study_data, "remove_leftovers", lambda data, root: None)  # killed before
    study_data.write(data, tmp_path, workers=1)
    monkeypatch.undo()
    raw = tmp_path / "data" / f"{Path(study_data.place(data, tmp_path)).name}.raw"
    assert raw.is_dir()
    study_data.write(data, tmp_path)
    assert not raw.exists()
    assert study_data.is_complete(data, tmp_path)


def test_the_order_of_the_splits_does_not_change_their_tiles(tmp_path):
    def digests(*splits: str) -> list[list[str]]:
        root = tmp_path / "-".join(splits)
        data = Data(dataset="treesatai_ts", tiles=dict.fromkeys(splits, 2), seed=1)
        study_data.write(data, root, workers=1)
        manifest = Manifest.load(study_data.place(data, root))
        return [[shard.sha256 for shard in manifest.shards_of([s])] for s in sorted(splits)]

    assert digests("train", "val") == digests("val", "train")


def test_windows_of_scenes_are_small_tiles_of_many_scenes(tmp_path):
    data = Data(dataset="pastis_hd", tiles={"train": 1, "test": 2}, seed=1, window_m=160)
    study_data.write(data, tmp_path, workers=1)
    manifest = Manifest.load(study_data.place(data, tmp_path))
    assert (manifest.spec.tile_m, manifest.spec.crop_m, manifest.synthetic) == (160, 160, True)
    assert [m.size for m in manifest.spec.modalities] == [160, 16, 16, 16]
    assert sum(x.samples for x in manifest.shards_of(["test"])) == 2
    with pytest.raises(DatasetError, match="multiple of 10 from 160 to 1280"):
        study_data.write(Data(dataset="pastis_hd", tiles={"test": 1}, window_m=165), tmp_path)
    with pytest.raises(DatasetError, match="no synthetic tiles of another size"):
        study_data.write(Data(dataset="treesatai_ts", tiles={"test": 1}, window_m=60), tmp_path)


def test_a_window_is_the_middle_of_its_scene():
    whole = Scene(3, 0, 1280.0, 19, 36)
    tile = Windows(1, 3, 320).read("10000")
    middle = slice(48, 80)
    labels = whole.fractions(10.0).argmax(axis=0)[middle, middle]
    np.testing.assert_array_equal(tile.targets["crop_type"], labels)
    relief = dataclasses.replace(whole, window_m=320.0).relief(10.0)
    np.testing.assert_allclose(relief, whole.relief(10.0)[middle, middle], atol=1e-4)
    assert (tile.origin.west_m, tile.origin.north_m) == (400_480.0, 6_899_520.0)
    assert [a.shape[-1] for a in tile.arrays.values()] == [320, 32, 32, 32]


def test_the_place_follows_the_content(tmp_path):
    def place(**changes) -> str:
        values = {"dataset": "treesatai_ts", "tiles": {"train": 2}, "seed": 1, **changes}
        return study_data.place(Data(**values), tmp_path)

    assert place() == place()
    others = [place(seed=2), place(tiles={"train": 3}), place(dataset="pastis_hd"), place(window_m=40)]
    assert len({place(), *others}) == 5
    existing = Data(dataset="treesatai_ts", shards="s3://bucket/shards")
    assert study_data.place(existing, tmp_path) == "s3://bucket/shards"
    assert study_data.is_complete(existing, tmp_path)


@pytest.mark.parametrize("dataset", ["treesatai_ts", "pastis_hd", "flair_hub", "flair2"])
def test_the_identity_of_the_data_covers_all_modules_that_decide_them(dataset):
    """What these modules import from the package is among them too, but for the types of ``spec``, whose values are
    in the modules of the dataset, and the checks of files from elsewhere."""
    files = study_data.generator_files(dataset)
    package = Path(datasets.__file__).parent
    assert {"synth.py", "reader.py"} <= {path.name for path in files}
    named = {
        ".".join(["maestro_scale", "datasets", *p.relative_to(package).with_suffix("").parts]) for p in files
    }
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maestro_scale.datasets"):
                names = {f"{node.module}.{alias.name}" for alias in node.names} & named
                imported |= names or {node.module}
    assert {m for m in imported - named if "__init__" not in m} <= {"maestro_scale.datasets.spec"}


def test_comments_and_docstrings_of_the_generator_are_not_part_of_its_identity():
    assert study_data._code('"""A."""\ndef f():\n    """B."""\n    return 1  # c\n') == study_data._code(
        "def f():\n    return 1\n"
    )
    assert study_data._code("def f():\n    return 1\n") != study_data._code("def f():\n    return 2\n")
