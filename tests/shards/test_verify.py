"""``verify`` performs the checks of training, and reports what training would not notice."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maestro_scale.shards.errors import CodecError, ManifestError
from maestro_scale.shards.format import codec
from maestro_scale.shards.format.codec import Sample, encode, encode_fields
from maestro_scale.shards.format.fields import tile_fields
from maestro_scale.shards.format.index import ShardIndex
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.format.tar import TarWriter
from maestro_scale.shards.read.preview import read_first_sample
from maestro_scale.shards.read.summary import summarize
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.stream.packing import arrays_in, num_bytes
from maestro_scale.stream.transform import Transform
from tests.shards.kit import SPEC, TILE_BYTES, Toy, tile, toy_keys


def publish(folder: Path, spec=SPEC, **splits: str) -> None:
    """Write a manifest for tars that exist; ``splits``: {name of the tar: split}."""
    shards = []
    for name, split in splits.items():
        data = (folder / f"{name}.tar").read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            count = len(tar.getmembers())
        shards.append(ShardInfo(f"{name}.tar", split, len(data), count, hashlib.sha256(data).hexdigest()))
    (folder / "manifest.json").write_text(Manifest(1, spec, tuple(shards)).dumps())


def write_tar(path: Path, samples: Mapping[str, bytes] | list[tuple[str, bytes]]) -> None:
    tar = TarWriter(path)
    for key, payload in samples.items() if isinstance(samples, Mapping) else samples:
        tar.add(key, payload)
    tar.finish()


def claimed(**changes: object) -> bytes:
    """A sample whose compressed field s2 claims another layout."""
    fields = {**tile_fields(tile("a")), "s2": np.zeros((4, 2, 64, 64), np.int16)}
    data = encode_fields("a", fields, "zstd")
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    encoded = json.loads(header["__metadata__"]["encoded"])
    encoded["s2"].update(changes)
    header["__metadata__"]["encoded"] = json.dumps(encoded)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # 512 MiB in bands: within what the codec decodes.
        ({"shape": [4, 1024, 256, 256]}, "s2 is int16 (4, 1024, 256, 256), expected int16 (4, 2, 8, 8)"),
        ({"shape": [4, 2, 64, 64], "dtype": "uint16"}, "s2 is uint16 (4, 2, 64, 64), expected int16"),
        # 6 GiB, the shape of the spec but for the number of dates.
        ({"shape": [25_165_824, 2, 8, 8]}, "has more than 512 MiB"),
    ],
)
def test_a_layout_is_refused_from_the_header_before_anything_is_decoded(
    tmp_path, monkeypatch, changes, reason
):
    def decode(*args: object) -> np.ndarray:
        raise AssertionError("decoded before the layout was checked")

    payload = claimed(**changes)
    write_tar(tmp_path / "train-000000.tar", {"a": payload})
    publish(tmp_path, **{"train-000000": "train"})
    monkeypatch.setattr(codec, "decompress_all", decode)
    monkeypatch.setattr(codec, "decompress_rows", decode)
    (problem,) = verify(str(tmp_path))
    assert reason in problem
    # Training refuses the same sample, also without decoding the field.
    transform = Transform(dataclasses.replace(SPEC, sensors=SPEC.sensors[1:], ref_sensor="s2"))
    arrays = arrays_in(torch_block(transform), transform.fields, 1)
    with pytest.raises(CodecError):
        transform.train(Sample(payload), 0, 0, arrays, 0)


def torch_block(transform: Transform):
    import torch

    return torch.zeros(num_bytes(transform.fields, 1), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"s2.dates": np.ones((2, 3), np.int16)}, "s2.dates is int16 (2, 3)"),
        ({"s2.dates": np.ones((3, 2), np.int16)}, "s2.dates is int16 (3, 2)"),
        ({"s2": np.zeros((0, 2, 8, 8), np.int16)}, "s2 has no dates"),
        ({"s2": np.zeros((), np.int16)}, "s2 is int16 ()"),
        ({"s2.mask": np.zeros((3, 1, 8, 8), np.uint8)}, "s2.mask is uint8 (3, 1, 8, 8)"),
        ({"ref_date": np.zeros(4, np.int16)}, "ref_date is int16 (4,)"),
        ({"target.kinds": np.zeros(2, np.float32)}, "target.kinds is float32 (2,)"),
        ({"target.cover": np.zeros((8, 9), np.uint8)}, "target.cover is uint8 (8, 9)"),
        ({"aerial": None}, "field"),
        ({"s2.mask": None}, "field"),
        ({"target.cover": None}, "field"),
    ],
)
def test_verify_and_training_refuse_the_same_fields(tmp_path, change, reason):
    fields = tile_fields(tile("a"))
    assert len(fields["s2"]) == 3
    fields = {name: a for name, a in {**fields, **change}.items() if a is not None}
    payload = encode_fields("a", fields)
    write_tar(tmp_path / "train-000000.tar", {"a": payload})
    publish(tmp_path, **{"train-000000": "train"})
    (problem,) = verify(str(tmp_path))
    assert reason in problem
    transform = Transform(SPEC)
    with pytest.raises(CodecError) as error:
        transform.train(Sample(payload), 0, 0, arrays_in(torch_block(transform), transform.fields, 1), 0)
    assert reason in str(error.value)


def test_a_key_twice_in_a_shard_or_in_two_splits(tmp_path):
    a, b = encode(tile("a")), encode(tile("b"))
    write_tar(tmp_path / "train-000000.tar", [("a", a), ("b", b), ("a", a)])
    write_tar(tmp_path / "test-000000.tar", {"b": b})
    publish(tmp_path, **{"train-000000": "train", "test-000000": "test"})
    warnings: list[str] = []
    assert verify(str(tmp_path), warn=warnings.append) == [
        "train-000000.tar: sample 'a' is twice in it (1 repeated keys)"
    ]
    assert warnings == [
        "splits train and test share 1 samples (first: 'b'): scores on test would be measured on tiles of train"
    ]
    publish(tmp_path, **{"train-000000": "fold_1", "test-000000": "fold_2"})
    warnings.clear()
    verify(str(tmp_path), warn=warnings.append)
    assert warnings == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("directory", "member 'more/' is a directory"),
        ("link", "member 'more' is a symbolic link"),
        ("file", "member 'more' is not named <key>.safetensors"),
        ("appended", "contains data after the end of the archive at byte"),
    ],
)
def test_a_tar_contains_samples_only(tmp_path, kind, reason):
    path = tmp_path / "train-000000.tar"
    write_tar(path, {"a": encode(tile("a"))})
    publish(tmp_path, **{"train-000000": "train"})
    assert verify(str(tmp_path)) == []
    if kind == "appended":
        path.write_bytes(path.read_bytes() + b"second archive".ljust(512, b"\0"))
    else:
        kinds = {"directory": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "file": tarfile.REGTYPE}
        member = tarfile.TarInfo("more")
        member.type = kinds[kind]
        with tarfile.open(path, "a") as tar:
            tar.addfile(member)
    data = path.read_bytes()
    shard = ShardInfo(path.name, "train", len(data), 1, hashlib.sha256(data).hexdigest())
    (tmp_path / "manifest.json").write_text(Manifest(1, SPEC, (shard,)).dumps())
    (problem,) = verify(str(tmp_path))
    assert problem.startswith("train-000000.tar: ")
    assert reason in problem


def test_shards_that_are_missing_are_found_without_a_folder_for_each(tmp_path, monkeypatch):
    manifest = write_shards(Toy(3), str(tmp_path), "train")
    shards = tuple(ShardInfo(f"{i}.tar", "train", 10, 1, "0" * 64) for i in range(50))
    (tmp_path / "manifest.json").write_text(replace(manifest, shards=shards).dumps())
    (tmp_path / "manifest.sha256").unlink()
    monkeypatch.setattr("maestro_scale.shards.read.verify.temporary_folder", None)
    problems = verify(str(tmp_path))
    assert [p for p in problems if p.endswith(".tar: is missing")] == [
        f"{i}.tar: is missing" for i in range(50)
    ]


def test_indices_are_asked_for_at_the_same_time(tmp_path, monkeypatch):
    write_shards(Toy(12), str(tmp_path), "train", shard_mb=4 * TILE_BYTES / 1e6)
    assert len(Manifest.load(str(tmp_path)).shards) >= 3
    expected, together, read = summarize(str(tmp_path)), threading.Barrier(3), ShardIndex.read

    def wait_for_others(storage, name):
        together.wait(20)
        return read(storage, name)

    monkeypatch.setattr(ShardIndex, "read", wait_for_others)
    assert summarize(str(tmp_path)) == expected


def test_an_index_of_another_shard_and_a_manifest_without_shards(tmp_path):
    write_shards(Toy(2), str(tmp_path), "train")
    (info,) = Manifest.load(str(tmp_path)).shards
    assert read_first_sample(str(tmp_path), info).key in toy_keys(2)
    path = tmp_path / "train-000000.index.json"
    index = json.loads(path.read_text())
    for changes in ({"keys": [], "offsets": [], "sizes": []}, {"bytes": 2**50, "sizes": [2**49, 2**49]}):
        path.write_text(json.dumps(index | changes))
        with pytest.raises(ManifestError, match=r"is not the index of train-000000.tar"):
            read_first_sample(str(tmp_path), info)
    for file in (path, tmp_path / info.path, tmp_path / "manifest.sha256"):
        file.unlink()
    (tmp_path / "manifest.json").write_text(Manifest(1, SPEC, ()).dumps())
    assert verify(str(tmp_path)) == [f"{tmp_path}/manifest.json: lists no shards"]


def test_a_spec_that_the_model_cannot_be_trained_on(tmp_path):
    write_tar(tmp_path / "train-000000.tar", {"a": encode(tile("a"))})
    publish(tmp_path, dataclasses.replace(SPEC, crop_m=2.5), **{"train-000000": "train"})
    assert verify(str(tmp_path)) == [
        "spec.crop_m: 2.5 m is not a multiple of the coarsest sensor's pixel, 1 m: use 2 or 3"
    ]
    other = dataclasses.replace(SPEC.sensors[1], name="other", embed="aerial")
    publish(tmp_path, dataclasses.replace(SPEC, sensors=(*SPEC.sensors, other)), **{"train-000000": "train"})
    (problem,) = verify(str(tmp_path))
    assert problem.startswith("spec.sensors.other.embed: 'aerial' is shared with aerial, but patch 2")
