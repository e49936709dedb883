"""Tiles that lack modalities: stored by what they lack, whatever writes them, and verified."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console
from shards.kit import SPEC, TILE_BYTES, Toy, fields_equal, tile, toy_keys

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Tile
from maestro_scale.shards import as_webdataset
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.measure import measure
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.summary import summarize
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.packing import shuffle_keys
from maestro_scale.shards.write.part import WriterPart
from maestro_scale.shards.write.writer import Writer, write_shards
from maestro_scale.tracking.inspection import tables
from maestro_scale.tracking.tile_picture import panels

OPTIONAL = replace(SPEC, modalities=tuple(replace(m, optional=m.name != "aerial") for m in SPEC.modalities))
SMALL = 4 * TILE_BYTES / 1e6
NUM_TILES = 40


def lacks(key: str) -> tuple[str, ...]:
    """Every 5th tile lacks s1, every 8th s2 too."""
    number = toy_keys(NUM_TILES).index(key)
    return ("s2", "s1") if number % 8 == 7 else ("s1",) if number % 5 == 4 else ()


def lacking(key: str) -> Tile:
    whole = tile(key)
    parts = (
        {n: a for n, a in part.items() if n not in lacks(key)}
        for part in (whole.arrays, whole.dates, whole.masks)
    )
    arrays, dates, masks = parts
    return replace(whole, arrays=arrays, dates=dates, masks=masks)


@dataclass(frozen=True)
class Mixed(Toy):
    """What its tiles lack is known only by reading them."""

    count: int = NUM_TILES
    spec: DatasetSpec = OPTIONAL

    def read(self, key: str) -> Tile:
        super().read(key)
        return lacking(key)


@dataclass(frozen=True)
class Announced(Mixed):
    """``wrong``: a tile of which it says that it lacks nothing."""

    wrong: str = ""

    def absent(self, key: str) -> tuple[str, ...]:
        return () if key == self.wrong else lacks(key)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(Announced(), str(folder), "train", shard_mb=SMALL)
    return folder


def test_every_shard_has_tiles_that_lack_the_same_and_the_manifest_says_what(mixed: Path):
    manifest = Manifest.load(str(mixed))
    counts = {(): 0, ("s1",): 0, ("s2", "s1"): 0}
    keys = []
    store = Store(str(mixed), mixed / "cache", 2**30)
    for info in manifest.shards:
        counts[info.absent] += info.samples
        with store.shard(info) as shard:
            for sample in shard:
                keys.append(sample.key)
                assert lacks(sample.key) == info.absent
                assert fields_equal(sample, lacking(sample.key))
    assert sorted(keys) == toy_keys(NUM_TILES)
    assert counts == {(): 28, ("s1",): 7, ("s2", "s1"): 5}
    # Names as ever, complete tiles first, and shards of about the size that was asked for.
    assert [s.path for s in manifest.shards] == [f"train-{i:06d}.tar" for i in range(len(manifest.shards))]
    assert [bool(s.absent) for s in manifest.shards] == sorted(bool(s.absent) for s in manifest.shards)
    assert len(manifest.shards) < 12
    assert manifest.notes["lacks s1"] == 7
    assert manifest.notes["lacks s2, s1"] == 5
    # The spec is that of a dataset in which nothing may be missing: splits with and without gaps fit together.
    assert manifest.spec == SPEC
    assert verify(str(mixed)) == []


def test_writers_workers_parts_and_announcements_give_the_same_bytes(mixed: Path, tmp_path: Path):
    write_shards(Mixed(), str(tmp_path / "read"), "train", shard_mb=SMALL, workers=2)
    for number in (2, 1):
        write_shards(
            Announced(), str(tmp_path / "parts"), "train", shard_mb=SMALL, part=WriterPart(number, 2)
        )
    with Writer(str(tmp_path / "added"), OPTIONAL, "train") as writer:
        writer._shard_bytes = int(SMALL * 1e6)
        for key in reversed(toy_keys(NUM_TILES)):
            writer.add(lacking(key))
    expected = content(mixed)
    expected.pop("cache", None)
    for way in ("read", "parts", "added"):
        assert content(tmp_path / way) == expected


@pytest.fixture(autouse=True)
def _no_cache(mixed: Path):
    yield
    import shutil

    shutil.rmtree(mixed / "cache", ignore_errors=True)


def test_an_interrupted_write_continues(mixed: Path, tmp_path: Path):
    late = shuffle_keys([key for key in toy_keys(NUM_TILES) if not lacks(key)], 0)[-1]
    with pytest.raises(DatasetError):
        write_shards(Announced(broken=(late,)), str(tmp_path), "train", shard_mb=SMALL)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert kept
    write_shards(Announced(), str(tmp_path), "train", shard_mb=SMALL)
    assert content(tmp_path) == content(mixed)
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}.items()


def test_a_split_without_gaps_has_the_bytes_of_a_dataset_that_permits_none(tmp_path: Path):
    write_shards(Toy(12), str(tmp_path / "plain"), "train", shard_mb=SMALL)
    write_shards(Toy(12, spec=OPTIONAL), str(tmp_path / "optional"), "train", shard_mb=SMALL)
    assert content(tmp_path / "plain") == content(tmp_path / "optional")
    # A split with gaps is added to a dataset that has none.
    write_shards(Announced(), str(tmp_path / "plain"), "val", shard_mb=SMALL)
    assert Manifest.load(str(tmp_path / "plain")).splits == ("train", "val")
    assert verify(str(tmp_path / "plain")) == []


def test_a_tile_that_lacks_what_it_must_have_is_an_error(tmp_path: Path):
    key = toy_keys(NUM_TILES)[0]
    with Writer(str(tmp_path / "a"), OPTIONAL, "train") as writer:
        writer.add(tile(key))
        whole = tile(toy_keys(NUM_TILES)[1])
        without = replace(whole, arrays={n: a for n, a in whole.arrays.items() if n != "aerial"})
        with pytest.raises(DatasetError, match="lacks the field aerial"):
            writer.add(without)
        half = replace(whole, arrays={n: a for n, a in whole.arrays.items() if n != "s2"})
        with pytest.raises(DatasetError, match=r"has, unlike the spec, the field s2\.dates"):
            writer.add(half)
    every = replace(OPTIONAL, modalities=tuple(replace(m, optional=True) for m in OPTIONAL.modalities))
    with Writer(str(tmp_path / "b"), every, "train") as writer:
        writer.add(tile(key))
        with pytest.raises(DatasetError, match="has no modality at all"):
            writer.add(replace(whole, arrays={}, dates={}, masks={}))


def test_a_reader_that_announces_something_else_is_an_error(tmp_path: Path):
    wrong = toy_keys(NUM_TILES)[4]
    with pytest.raises(DatasetError, match="lacks s1, but was announced to lack nothing"):
        write_shards(Announced(wrong=wrong), str(tmp_path / "strict"), "train", shard_mb=SMALL)
    manifest = write_shards(
        Announced(wrong=wrong), str(tmp_path / "s"), "train", shard_mb=SMALL, strict=False
    )
    assert manifest.notes["left out: other modalities than announced"] == 1
    assert sum(s.samples for s in manifest.shards) == NUM_TILES - 1


@pytest.mark.parametrize(
    ("absent", "problem"),
    [
        (["s9"], "unknown modality 's9'"),
        (["s1", "s2"], "in the order of spec.modalities"),
        (["s1", "s1"], "in the order of spec.modalities"),
        (["aerial", "s2", "s1"], "lists every modality"),
    ],
)
def test_a_manifest_whose_shards_lack_something_impossible_is_refused(
    mixed: Path, absent: list[str], problem: str
):
    data = json.loads((mixed / "manifest.json").read_text())
    data["shards"][0]["absent"] = absent
    with pytest.raises(ManifestError, match=rf"shards\[0\]\.absent: .*{problem}"):
        Manifest.loads(json.dumps(data))


@pytest.mark.parametrize(
    ("absent", "problem"), [(["s1"], "has, unlike the spec, the field s1"), ([], "lacks")]
)
def test_verify_compares_what_tiles_lack_with_the_manifest(mixed: Path, tmp_path: Path, absent, problem):
    for name, data in content(mixed).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "manifest.sha256").unlink()
    data = json.loads((tmp_path / "manifest.json").read_text())
    shard = data["shards"][0 if absent else -1]
    shard.pop("absent", None)
    shard |= {"absent": absent} if absent else {}
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    problems = verify(str(tmp_path))
    assert any(problem in line for line in problems)
    assert any("says that tiles lack" in line for line in problems)


def test_inspect_counts_the_tiles_by_what_they_lack(mixed: Path):
    summary = summarize(str(mixed))
    assert summary.splits[0].absent == {(): 28, ("s1",): 7, ("s2", "s1"): 5}
    assert sum(summary.splits[0].months["aerial"]) == 40
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 # closed with the process
    console.print(tables(summary))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    for wanted in ("(complete) 28", "s1 7", "s2, s1 5"):
        assert wanted in lines
    last = Manifest.load(str(mixed)).shards[-1]
    with Store(str(mixed), mixed / "cache", 2**30).shard(last) as shard:
        assert not any("s2" in p.title or "s1" in p.title for row in panels(shard[0], SPEC) for p in row)
    assert measure(str(mixed), 40).num_tiles > 30


def test_a_webdataset_pipeline_has_the_fields_that_a_tile_has(mixed: Path):
    found = {
        s["__key__"]: {n for n in ("aerial", "s2", "s1") if n in s}
        for s in as_webdataset(str(mixed), "train")
    }
    assert found == {key: {"aerial", "s2", "s1"} - {*lacks(key)} for key in toy_keys(NUM_TILES)}


def test_a_tile_from_arrays_leaves_optional_rasters_out(tmp_path: Path):
    import numpy as np

    from maestro_scale.shards.write.from_arrays import Raster, describe

    spec = describe(
        "mine",
        40.0,
        [
            Raster("radar", ["VV"], 10.0, "float32", 2, optional=True),
            Raster("image", ["R"], 5.0, "uint8", 2, optional=True),
        ],
    )
    with Writer(str(tmp_path), spec, "train") as writer:
        writer.add_arrays("a", {"radar": np.ones((1, 4, 4), "f4")}, {"radar": "2020-01-01"})
        writer.add_arrays("b", {"image": np.ones((1, 8, 8), "u1")}, {"image": "2020-05-01"})
        with pytest.raises(DatasetError, match="any raster has no dates"):
            writer.add_arrays("c", {}, {})
    assert [s.absent for s in Manifest.load(str(tmp_path)).shards] == [("image",), ("radar",)]
    assert verify(str(tmp_path)) == []
