"""The synthetic data of a study: exact numbers of tiles by split, written once."""

from __future__ import annotations

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
    assert study_data.is_complete(data, tmp_path)
    assert [p.name for p in (tmp_path / "data").iterdir() if p.name.endswith(".raw")] == []
    study_data.write(data, tmp_path)  # nothing to do


def test_the_order_of_the_splits_does_not_change_their_tiles(tmp_path):
    def digests(*splits: str) -> list[list[str]]:
        root = tmp_path / "-".join(splits)
        data = Data(dataset="treesatai_ts", tiles=dict.fromkeys(splits, 2), seed=1)
        study_data.write(data, root, workers=1)
        manifest = Manifest.load(study_data.place(data, root))
        return [[shard.sha256 for shard in manifest.shards_of([s])] for s in sorted(splits)]

    assert digests("train", "val") == digests("val", "train")


def test_the_place_follows_the_content(tmp_path):
    def place(**changes) -> str:
        values = {"dataset": "treesatai_ts", "tiles": {"train": 2}, "seed": 1, **changes}
        return study_data.place(Data(**values), tmp_path)

    assert place() == place()
    assert len({place(), place(seed=2), place(tiles={"train": 3}), place(dataset="pastis_hd")}) == 4
    existing = Data(dataset="treesatai_ts", shards="s3://bucket/shards")
    assert study_data.place(existing, tmp_path) == "s3://bucket/shards"
    assert study_data.is_complete(existing, tmp_path)


def test_comments_and_docstrings_of_the_generator_are_not_part_of_its_identity():
    assert study_data._code('"""A."""\ndef f():\n    """B."""\n    return 1  # c\n') == study_data._code(
        "def f():\n    return 1\n"
    )
    assert study_data._code("def f():\n    return 1\n") != study_data._code("def f():\n    return 2\n")
