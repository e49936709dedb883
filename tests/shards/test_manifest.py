"""Manifests are parsed strictly, and errors name the path of the entry."""

from __future__ import annotations

import json

import pytest
from shards.kit import SPEC, Toy

from maestro_scale import datasets
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.write.writer import write_shards

SHARD = ShardInfo("train-000000.tar", "train", 10, 1, "0" * 64)
MANIFEST = Manifest(1, SPEC, (SHARD, ShardInfo("val-000000.tar", "val", 10, 2, "1" * 64)), {"odd": 3}, "zstd")


def test_round_trip():
    assert Manifest.loads(MANIFEST.dumps()) == MANIFEST
    for name in datasets.known():
        manifest = Manifest(1, datasets.spec(name), (SHARD,))
        assert Manifest.loads(manifest.dumps()) == manifest
        assert Manifest.loads(manifest.dumps()).digest == manifest.digest


def test_the_digest_depends_on_the_data_alone():
    from dataclasses import replace

    assert replace(MANIFEST, created_with={"x": "2"}, notes={}).digest == MANIFEST.digest
    assert replace(MANIFEST, shards=MANIFEST.shards[:1]).digest != MANIFEST.digest
    assert replace(MANIFEST, shards=MANIFEST.shards[:1]).digest_of(["train"]) == MANIFEST.digest_of(["train"])
    assert replace(MANIFEST, spec=replace(SPEC, crop_m=4.0)).digest != MANIFEST.digest
    # The same in all versions: a resumed run compares it with its checkpoint.
    assert MANIFEST.digest == Manifest.loads(MANIFEST.dumps()).digest


def test_an_unknown_split_lists_the_existing_ones():
    assert [s.split for s in MANIFEST.shards_of(["val", "train"])] == ["val", "train"]
    with pytest.raises(ManifestError, match="toy has no split 'test' in shards; there are: train, val"):
        MANIFEST.shards_of(["test"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format version 2, this maestro-scale reads up to 1; upgrade"),
        (lambda m: m.pop("format_version"), "has no format_version"),
        (lambda m: m.update(shard=[]), "shard: no such key; did you mean 'shards'"),
        (lambda m: m.pop("spec"), "spec: is missing"),
        (lambda m: m["spec"]["modalities"][1].update(dtype="int12"), r"spec.modalities\[1\].dtype: 'int12'"),
        (
            lambda m: m["spec"]["modalities"][1].update(size="8"),
            r"spec.modalities\[1\].size: is '8', expected int",
        ),
        (
            lambda m: m["spec"]["modalities"][1].update(series=1),
            r"modalities\[1\].series: is 1, expected bool",
        ),
        (
            lambda m: m["spec"]["targets"][0].update(kind="fuzzy"),
            r"targets\[0\].kind: is 'fuzzy', expected one of",
        ),
        (lambda m: m["spec"]["sensors"][0].update(source="x"), r"sensors\[0\].source: unknown modality 'x'"),
        (
            lambda m: m["spec"]["sensors"][0].update(bands=[3]),
            r"sensors\[0\].bands: \[3\] do not index the 3 bands of",
        ),
        (
            lambda m: m["spec"]["sensors"][1].update(name="aerial"),
            r"sensors\[1\].name: 'aerial' is there twice",
        ),
        (
            lambda m: m["shards"][0].update(path="../x.tar"),
            r"shards\[0\].path: '../x.tar' is not a path below",
        ),
        (
            lambda m: m["shards"][1].update(path=SHARD.path),
            r"shards\[1\].path: train-000000.tar is listed twice",
        ),
        (lambda m: m["shards"][0].update(sha256="abc"), r"shards\[0\].sha256: 'abc' is not 64"),
        (lambda m: m["shards"][0].update(samples=0), r"shards\[0\]: 10 bytes, 0 samples"),
        (lambda m: m.update(codec="gzip"), "codec: 'gzip' is not one of raw"),
    ],
)
def test_errors_name_the_path_of_the_entry(tmp_path, change, message):
    data = json.loads(MANIFEST.dumps())
    change(data)
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=message) as error:
        Manifest.load(str(tmp_path))
    assert str(tmp_path / "manifest.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_manifest_and_invalid_json(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest.json: not found; write the dataset"):
        Manifest.load(str(tmp_path / "nowhere"))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match=r"manifest.json: is not JSON"):
        Manifest.load(str(tmp_path))


def test_defaults_may_be_left_out_of_a_manifest_written_by_hand(tmp_path):
    write_shards(Toy(2), str(tmp_path), "train")
    data = json.loads((tmp_path / "manifest.json").read_text())
    for name in ("notes", "codec", "created_with", "seed"):
        data.pop(name)
    for sensor in data["spec"]["sensors"]:
        for name in ("token_groups", "elevation", "mask_threshold"):
            sensor.pop(name)
    assert Manifest.loads(json.dumps(data)).digest == Manifest.load(str(tmp_path)).digest
