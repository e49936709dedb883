"""Manifests are parsed strictly, and errors name the path of the entry."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from shards.kit import SPEC, Toy

from maestro_scale import datasets, untrusted
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format import checksum
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.storage import LocalStorage, open_storage
from maestro_scale.shards.write.writer import write_shards

SHARD = ShardInfo("train-000000.tar", "train", 10, 1, "0" * 64)
MANIFEST = Manifest(1, SPEC, (SHARD, ShardInfo("val-000000.tar", "val", 10, 2, "1" * 64)), {"odd": 3}, "zstd")


def test_round_trip():
    assert Manifest.loads(MANIFEST.dumps()) == MANIFEST
    for name in datasets.known():
        manifest = Manifest(1, datasets.spec(name), (SHARD,))
        assert Manifest.loads(manifest.dumps()) == manifest
        assert Manifest.loads(manifest.dumps()).content_digest == manifest.content_digest


def test_the_content_digest_depends_on_the_data_alone():
    assert replace(MANIFEST, created_with={"x": "2"}, notes={}).content_digest == MANIFEST.content_digest
    assert replace(MANIFEST, shards=MANIFEST.shards[:1]).content_digest != MANIFEST.content_digest
    assert replace(MANIFEST, shards=MANIFEST.shards[:1]).digest_of(["train"]) == MANIFEST.digest_of(["train"])
    assert replace(MANIFEST, spec=replace(SPEC, crop_m=4.0)).content_digest != MANIFEST.content_digest
    # The same in all versions: a resumed run compares it with its checkpoint.
    assert MANIFEST.content_digest == Manifest.loads(MANIFEST.dumps()).content_digest


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
            lambda m: m["shards"][1].update(path="train-000000"),
            r"shards\[1\].path: train-000000 is listed twice, with or without .tar",
        ),
        (
            lambda m: m["shards"][1].update(path=SHARD.path),
            r"shards\[1\].path: train-000000.tar is listed twice",
        ),
        (lambda m: m["shards"][0].update(sha256="abc"), r"shards\[0\].sha256: 'abc' is not 64"),
        (lambda m: m["shards"][0].update(samples=0), r"shards\[0\]: 10 bytes, 0 samples"),
        (
            lambda m: m["shards"][0].update(bytes=2**60, samples=2**60),
            r"shards\[0\]: 1152921504606846976 samples in .* at most 250000 samples and 1 TiB",
        ),
        (lambda m: m["shards"][0].update(samples=11), r"shards\[0\]: 11 samples in 10 bytes"),
        (lambda m: m["shards"][0].update(bytes=-1), r"shards\[0\]: -1 bytes, 1 samples"),
        (lambda m: m["shards"][0].update(path="a\0b.tar"), r"shards\[0\].path: 'a\\x00b.tar' is not a path"),
        (lambda m: m["shards"][0].update(path="a\nb.tar"), r"shards\[0\].path: 'a\\nb.tar' is not a path"),
        (lambda m: m["shards"][0].update(split="s" * 101), "is not a split name; use at most 100"),
        (lambda m: m.update(shards=None), "shards: is None, expected a list"),
        (lambda m: m.update(codec=None), "codec: is None, expected str"),
        (lambda m: m["notes"].update(odd=-3), "notes: 'odd' is counted -3 times"),
        (
            lambda m: m["spec"]["sensors"][0]["scale"].update(divisor=0),
            r"spec.sensors\[0\].scale.divisor: is 0, must be a positive number",
        ),
        (lambda m: m["spec"].update(tile_m=-8.0), "spec.tile_m: is -8, must be a positive number of metres"),
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


def test_numbers_that_json_does_not_have_and_repeated_keys_are_refused():
    text = MANIFEST.dumps()
    for number, message in (("NaN", "contains NaN"), ("Infinity", "contains Infinity"), ("1e999", "1e999")):
        with pytest.raises(ManifestError, match=message):
            Manifest.loads(text.replace('"tile_m": 8.0', f'"tile_m": {number}'))
    with pytest.raises(ManifestError, match="contains the key 'tile_m' twice"):
        Manifest.loads(text.replace('"tile_m": 8.0', '"tile_m": 8.0, "tile_m": 9.0'))


def test_splits_of_a_large_manifest_are_found_in_linear_time():
    shards = tuple(ShardInfo(f"{i}.tar", f"s{i}", 10, 1, "0" * 64) for i in range(20_000))
    manifest = replace(MANIFEST, shards=shards)
    started = time.process_time()
    assert manifest.shards_of(manifest.splits) == shards
    assert time.process_time() - started < 5  # quadratic: minutes
    with pytest.raises(ManifestError, match=r"no split 'x' in shards; there are: s0, .*, s29, …$"):
        manifest.shards_of(["x"])


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
    assert Manifest.loads(json.dumps(data)).content_digest == Manifest.load(str(tmp_path)).content_digest


def test_the_digest_is_that_of_the_file(tmp_path):
    # The value that `sha256sum manifest.json` prints for these bytes, whatever dumps() would write.
    text = json.dumps(json.loads(MANIFEST.dumps()))
    (tmp_path / "manifest.json").write_text(text)
    loaded = Manifest.load(str(tmp_path))
    assert loaded.digest == hashlib.sha256(text.encode()).hexdigest() != MANIFEST.digest
    assert MANIFEST.digest == hashlib.sha256(MANIFEST.dumps().encode()).hexdigest()
    assert loaded == MANIFEST  # the digest is not part of the content
    assert pickle.loads(pickle.dumps(loaded)).digest == loaded.digest
    assert replace(loaded, seed=1).digest != loaded.digest


def test_a_manifest_that_its_checksum_file_contradicts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checksum, "_WAITS_S", (0.0, 0.0))
    path = tmp_path / "manifest.json"
    path.write_text(MANIFEST.dumps())
    checksum.write_checksum(LocalStorage(tmp_path))
    assert (tmp_path / "manifest.sha256").read_text() == f"{MANIFEST.digest}  manifest.json\n"
    subprocess.run(["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=tmp_path, check=True)
    assert Manifest.load(str(tmp_path)) == MANIFEST
    path.write_text(MANIFEST.dumps().replace('"divisor": 255', '"divisor": 256'))
    with pytest.raises(
        ManifestError, match=r"manifest.json: has SHA-256 .*manifest.sha256 beside it says"
    ) as error:
        Manifest.load(str(tmp_path))
    assert "\n" not in str(error.value)
    assert verify(str(tmp_path)) == [str(error.value)]
    (tmp_path / "manifest.sha256").write_text("d41d8cd9  manifest.json\n")
    with pytest.raises(
        ManifestError, match=r"manifest.sha256: has no single line of `sha256sum manifest.json`"
    ):
        Manifest.load(str(tmp_path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "manifest.sha256").write_text(
        f"{'0' * 64} *train-000000.tar\r\n{digest} *./manifest.json\r\n"
    )
    assert Manifest.load(str(tmp_path)).digest == digest
    checksum.remove_checksum(LocalStorage(tmp_path))
    assert Manifest.load(str(tmp_path)).spec.sensors[0].scale.divisor == 256


class Publishing(LocalStorage):
    """A folder where another process publishes a manifest just after a reader has read the old one."""

    published = False

    def read(self, name: str, limit: int | None = None) -> bytes:
        data = super().read(name, limit)
        if not self.published:
            self.published = True
            self.write("manifest.json", b"new")
            self.write("manifest.sha256", checksum.checksum_bytes(b"new"))
        return data


def test_a_reader_that_meets_a_publication_reads_again(tmp_path, monkeypatch):
    monkeypatch.setattr(checksum, "_WAITS_S", (0.0,))
    (tmp_path / "manifest.json").write_bytes(b"old")
    assert checksum.read_manifest_bytes(Publishing(tmp_path)) == b"new"


def test_the_checksum_file_is_of_the_manifest_that_was_published_last(tmp_path):
    class Overtaken(LocalStorage):
        """A slow writer: another one publishes between its reading of the manifest and its checksum."""

        def write(self, name: str, data: bytes) -> None:
            (self.folder / "manifest.json").write_bytes(b"theirs")
            super().write(name, data)

    (tmp_path / "manifest.json").write_bytes(b"mine")
    checksum.write_checksum(Overtaken(tmp_path))
    assert checksum.read_manifest_bytes(LocalStorage(tmp_path)) == b"theirs"


@pytest.mark.parametrize("url", ["folder", "memory://limits/toy"])
def test_a_manifest_that_is_too_large_is_not_read(tmp_path, monkeypatch, url):
    url = str(tmp_path) if url == "folder" else url
    monkeypatch.setattr(checksum, "MANIFEST_LIMITS", replace(untrusted.MANIFEST, bytes=10_000))
    storage = open_storage(url)
    storage.write("manifest.json", MANIFEST.dumps().encode())
    assert Manifest.load(url) == MANIFEST
    storage.write("manifest.json", MANIFEST.dumps().encode() + b" " * 10_000)
    with pytest.raises(
        ManifestError, match=r"manifest.json: is larger than 0.00954 MiB, which no such file needs"
    ):
        Manifest.load(url)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_manifest_that_is_not_a_file_neither_blocks_nor_fills_the_memory(tmp_path, kind):
    path = tmp_path / "manifest.json"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ManifestError, match=r"manifest.json: is not a regular file"):
        Manifest.load(str(tmp_path))


def test_the_cost_of_a_shard_is_a_few_calls():
    """A manifest of 100,000 shards is read in less than a second: no objects per shard but its own."""

    def num_calls(num_shards: int) -> int:
        shards = tuple(
            ShardInfo(f"train-{i:06d}-00ff.tar", "train", 1000 + i, 10, f"{i:064x}")
            for i in range(num_shards)
        )
        text = Manifest(1, SPEC, shards).dumps()
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            Manifest.loads(text)
        finally:
            sys.setprofile(None)
        return calls

    assert (num_calls(300) - num_calls(100)) / 200 <= 30  # 24 here, 45 with the general rules for each path
