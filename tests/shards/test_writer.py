"""Writing: the same bytes for any writer, resumable after a kill, and never a dataset that only looks complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from shards.kit import SPEC, TILE_BYTES, Toy, fields_equal, tile, toy_keys

from maestro_scale.datasets.spec import DatasetError
from maestro_scale.shards.errors import ManifestError, WriteError
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.summary import summarize
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.packing import shuffle_keys
from maestro_scale.shards.write.writer import Writer, write_shards

SMALL = 4 * TILE_BYTES / 1e6  # shard_mb for about four samples a shard


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_stock_webdataset_opens_the_shards(tmp_path):
    manifest = write_shards(Toy(10), str(tmp_path), "train", shard_mb=SMALL)
    assert len(manifest.shards) > 1
    urls = [str(tmp_path / info.path) for info in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [set(s) - {"__key__", "__url__", "__local_path__"} for s in samples] == [{"safetensors"}] * 10
    read = {Sample(s["safetensors"]).key: Sample(s["safetensors"]) for s in samples}
    assert sorted(read) == toy_keys(10)
    assert all(fields_equal(sample, tile(key)) for key, sample in read.items())


@pytest.mark.parametrize("codec", ["raw", "delta-zstd"])
def test_bytes_do_not_depend_on_workers_or_writer(tmp_path, codec):
    calls = []
    for workers in (1, 2):
        write_shards(
            Toy(12), str(tmp_path / f"{workers}"), "train", workers=workers, codec=codec, shard_mb=SMALL,
            progress=lambda *numbers: calls.append(numbers),
        )  # fmt: skip
        assert calls[-1][:2] == (12, 12)
        assert calls == sorted(calls)
        calls.clear()
    with Writer(str(tmp_path / "own"), SPEC, "train", codec=codec, shard_mb=SMALL) as writer:
        for key in reversed(toy_keys(12)):
            writer.add(tile(key))
    one = content(tmp_path / "1")
    assert len(one) >= 2 * 2 + 1
    assert one == content(tmp_path / "2") == content(tmp_path / "own")
    assert verify(str(tmp_path / "1")) == []


def test_samples_are_shuffled_and_evenly_spread(tmp_path):
    manifest = write_shards(Toy(11), str(tmp_path), "train", shard_mb=SMALL)
    assert {s.samples for s in manifest.shards} <= {3, 4, 5}
    store = Store(str(tmp_path), tmp_path / "cache", 0)
    keys = [key for info in manifest.shards for key in store.shard(info).keys]
    assert sorted(keys) == toy_keys(11) != keys
    other = write_shards(Toy(11), str(tmp_path / "other"), "train", shard_mb=SMALL, seed=1)
    assert other.content_digest != manifest.content_digest


def test_a_second_split_is_added_and_notes_are_counted(tmp_path):
    first = write_shards(Toy(6), str(tmp_path), "train")
    notes = sum(bool(tile(k).notes) for k in toy_keys(6))
    assert first.notes == {"odd one": notes}
    second = write_shards(Toy(3), str(tmp_path), "val")
    assert second.splits == ("train", "val")
    assert second.shards_of(["train"]) == first.shards
    assert second.notes["odd one"] == notes + sum(bool(tile(k).notes) for k in toy_keys(3))
    assert Manifest.load(str(tmp_path)) == second
    before = content(tmp_path)
    assert write_shards(Toy(3), str(tmp_path), "val", workers=2) == second
    assert content(tmp_path) == before
    assert verify(str(tmp_path)) == []


def test_examples_do_not_depend_on_the_order_of_the_splits(tmp_path):
    """Of 11 shuffled tiles the first with this note is tile 1, of 3 it is tile 2: the smaller key is kept."""
    counts = {"train": 11, "val": 3}
    alone = {s: write_shards(Toy(n), str(tmp_path / s), s).examples["odd one"] for s, n in counts.items()}
    assert alone == {"train": "Betula_spec._1_a/b%1", "val": "Betula_spec._2_a/b%2"}
    for order in (("train", "val"), ("val", "train")):
        for split in order:
            manifest = write_shards(Toy(counts[split]), str(tmp_path / "-".join(order)), split)
        assert manifest.examples == {"odd one": "Betula_spec._1_a/b%1"}


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (
            Toy(6, spec=replace(SPEC, name="other")),
            {},
            "contains a dataset with spec 'toy', not 'other'; choose another",
        ),
        (Toy(6, spec=replace(SPEC, crop_m=4.0)), {}, "contains a dataset with spec 'toy', not another one"),
        (Toy(6), {"codec": "zstd"}, "contains a dataset with codec raw, not zstd"),
        (Toy(6), {"seed": 1}, "contains a dataset with seed 0, not 1"),
        (Toy(7), {}, "already contains split 'train', with other tiles or settings"),
        (Toy(6), {"shard_mb": SMALL / 2}, "already contains split 'train', with other tiles or settings"),
    ],
)
def test_another_dataset_is_not_overwritten(tmp_path, dataset, options, message):
    write_shards(Toy(6), str(tmp_path), "train")
    before = content(tmp_path)
    with pytest.raises(WriteError, match=message):
        write_shards(dataset, str(tmp_path), "train", **options)
    assert content(tmp_path) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("a")
    with pytest.raises(
        WriteError, match=r"is not empty and contains no dataset in shards \(it has train.csv\)"
    ):
        write_shards(Toy(2), str(tmp_path), "train")
    (tmp_path / "train.csv").rename(tmp_path / "train-000000.tar")
    with pytest.raises(WriteError, match=r"train-000000.tar: is not a shard that maestro-scale wrote"):
        write_shards(Toy(2), str(tmp_path), "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file: the folder cannot be created"):
        write_shards(Toy(2), str(tmp_path / "file"), "train")
    with pytest.raises(WriteError, match="'a/b' is not a split name"):
        write_shards(Toy(2), str(tmp_path / "new"), "a/b")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_tile_stops_the_writer_without_a_manifest(tmp_path, workers):
    key = toy_keys(12)[5]
    dataset = Toy(12, broken=(key,))
    with pytest.raises(DatasetError, match="is truncated; fetch it again"):
        write_shards(dataset, str(tmp_path), "train", workers=workers, shard_mb=SMALL)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(ManifestError, match="not found"):
        Manifest.load(str(tmp_path))
    assert not list(tmp_path.glob(".*"))
    manifest = write_shards(Toy(12), str(tmp_path), "train", workers=workers, shard_mb=SMALL)
    assert sum(s.samples for s in manifest.shards) == 12


def test_unreadable_tiles_are_left_out_on_request(tmp_path):
    broken = tuple(toy_keys(12)[3:5])
    manifest = write_shards(Toy(12, broken), str(tmp_path / "a"), "train", shard_mb=SMALL, strict=False)
    assert manifest.notes["left out: cannot be read"] == 2
    assert sum(s.samples for s in manifest.shards) == 10
    assert verify(str(tmp_path / "a")) == []
    indices = "".join(p.read_text() for p in (tmp_path / "a").glob("*.index.json"))
    assert f'"{broken[0]}": "{broken[0]}.h5: is truncated; fetch it again"' in indices
    with pytest.raises(WriteError, match="none of its tiles can be read"):
        write_shards(Toy(2, tuple(toy_keys(2))), str(tmp_path / "b"), "train", strict=False)
    with pytest.raises(WriteError, match="none of its tiles"):
        write_shards(Toy(0), str(tmp_path / "b"), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrays": {}}, "tile t: lacks the field aerial"),
        ({"ref_date": np.zeros(2, np.int16)}, r"tile t: ref_date is int16 \(2,\), expected int16 \(3,\)"),
        (
            {"targets": {"kinds": np.zeros(3, np.float32), "cover": np.full((8, 8), 3, np.uint8)}},
            "cover contains the value 3",
        ),
        ({"key": ""}, "a key is a non-empty string"),
    ],
)
def test_a_tile_that_differs_from_its_spec_is_named(tmp_path, change, message):
    def write():
        with Writer(str(tmp_path), SPEC, "train") as writer:
            writer.add(tile("u"))
            writer.add(replace(tile("t"), **change))

    with pytest.raises(DatasetError, match=message):
        write()
    assert list(tmp_path.iterdir()) == []


def test_shapes_and_dtypes_are_checked(tmp_path):
    good = tile("t")
    with Writer(str(tmp_path), SPEC, "train") as writer:
        for name, array, message in (
            ("s2", good.arrays["s2"].astype(np.int32), "s2 is int32"),
            ("s2", good.arrays["s2"][:, :1], "s2 is int16"),
            ("s2", good.arrays["s2"][:1], "s2.dates is int16"),
            ("s2", good.arrays["s2"][:0], "s2 has no dates"),
            ("aerial", good.arrays["aerial"][..., :30], "aerial is uint8"),
        ):
            with pytest.raises(DatasetError, match=f"tile t: {message}"):
                writer.add(replace(good, arrays={**good.arrays, name: array}))
        writer.add(good)
        with pytest.raises(WriteError, match="tile t was added twice"):
            writer.add(good)


def test_a_split_has_one_writer_at_a_time(tmp_path):
    with Writer(str(tmp_path), SPEC, "train") as writer:
        writer.add(tile("a"))
        with pytest.raises(WriteError, match="another process is writing split 'train'"):
            write_shards(Toy(2), str(tmp_path), "train")
        write_shards(Toy(2), str(tmp_path), "val")
    assert sorted(Manifest.load(str(tmp_path)).splits) == ["train", "val"]


UNGUARDED = """
import sys
from shards.kit import Toy
from maestro_scale.shards.write.writer import write_shards
write_shards(Toy(12), sys.argv[1], "train", workers=2, shard_mb=0.03)
"""


def test_an_unguarded_script_fails_with_a_hint(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(UNGUARDED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(script), str(tmp_path / "shards")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'write `if __name__ == "__main__":` before' in done.stderr.splitlines()[-1]


KILLED = """
import sys
from shards.kit import Toy
from maestro_scale.shards.write.writer import write_shards
if __name__ == "__main__":
    write_shards(Toy(40, pause_s=0.05), sys.argv[1], "train", workers=int(sys.argv[2]),
    shard_mb=float(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_writer_is_resumed(tmp_path, workers):
    script, dst = tmp_path / "write.py", tmp_path / "killed"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "MARK": str(dst)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(dst), str(workers), str(SMALL)], env=environment
    )
    wait_until(lambda: len(list(dst.glob("*.tar"))) >= 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (dst / "manifest.json").exists()
    wait_until(lambda: not running(dst))  # the workers exit with their parent
    kept = {p.name: p.stat().st_mtime_ns for p in dst.glob("*.tar")}
    counts = []
    write_shards(Toy(40), str(dst), "train", shard_mb=SMALL, progress=lambda *numbers: counts.append(numbers))
    assert counts[0][0] >= 6  # samples of finished shards were not read again
    assert {name: (dst / name).stat().st_mtime_ns for name in kept} == kept
    write_shards(Toy(40), str(tmp_path / "whole"), "train", shard_mb=SMALL)
    assert content(dst) == content(tmp_path / "whole")


def test_a_damaged_or_missing_shard_of_a_finished_split_is_written_again(tmp_path):
    write_shards(Toy(12), str(tmp_path), "train", shard_mb=SMALL)
    whole = content(tmp_path)
    os.truncate(tmp_path / "train-000001.tar", 1000)
    (tmp_path / "train-000002.tar").unlink()
    assert len(verify(str(tmp_path))) == 2
    write_shards(Toy(12), str(tmp_path), "train", shard_mb=SMALL)
    assert content(tmp_path) == whole


def test_leftovers_of_another_plan_are_removed(tmp_path):
    late = shuffle_keys(toy_keys(20), seed=0)[-1]
    with pytest.raises(DatasetError):
        write_shards(Toy(20, broken=(late,)), str(tmp_path), "train", shard_mb=SMALL / 2)
    assert list(tmp_path.glob("*.tar"))
    write_shards(Toy(4), str(tmp_path), "train", shard_mb=SMALL)
    assert sorted(content(tmp_path)) == [
        "manifest.json",
        "manifest.sha256",
        "train-000000.index.json",
        "train-000000.tar",
    ]
    assert verify(str(tmp_path)) == []


def test_summary_counts_classes_and_dates(tmp_path):
    write_shards(Toy(8), str(tmp_path), "train", shard_mb=SMALL)
    (split,) = summarize(str(tmp_path)).splits
    tiles = [tile(key) for key in toy_keys(8)]
    assert split.num_samples == 8
    assert split.classes["kinds"]["oak"] == sum(t.targets["kinds"][0] > 0.1 for t in tiles)
    assert split.classes["cover"]["void (ignored)"] == sum((t.targets["cover"] == 2).sum() for t in tiles)
    assert sum(split.months["s2"]) == sum(len(t.dates["s2"]) for t in tiles)
    for index in tmp_path.glob("*.index.json"):
        index.unlink()
    assert summarize(str(tmp_path)).splits == (split,)
    assert verify(str(tmp_path)) == []


def wait_until(holds, timeout_s=60.0):
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def running(mark: Path) -> bool:
    """Whether a process is alive that has ``mark`` in its environment."""
    for process in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark}".encode() in process.read_bytes():
                return True
        except OSError:
            continue
    return False
