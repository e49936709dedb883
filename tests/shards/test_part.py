"""Parts of a split written by independent jobs equal the split written by one call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from shards.kit import SPEC, TILE_BYTES, Toy, tile, toy_keys

from maestro_scale.shards.errors import WriteError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.destination import Destination
from maestro_scale.shards.write.packing import PlannedShard
from maestro_scale.shards.write.part import WriterPart
from maestro_scale.shards.write.writer import Writer, write_shards

SMALL = 4 * TILE_BYTES / 1e6
BROKEN = tuple(toy_keys(42)[5:30:3])
DATASET = Toy(42, BROKEN)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def write(folder: Path, text: str = "1/1", dataset: Toy = DATASET) -> Manifest | None:
    return write_shards(
        dataset, str(folder), "train", shard_mb=SMALL, strict=False, part=WriterPart.parse(text), workers=1
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert len(write(folder).shards) > 4
    return folder


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_in_any_order_equal_a_single_run(tmp_path, whole, order):
    *first, last = (f"{i}/3" for i in order)
    for text in first:
        assert write(tmp_path, text) is None
        assert not (tmp_path / "manifest.json").exists()
    assert write(tmp_path, last) == Manifest.load(str(whole))
    assert content(tmp_path) == content(whole)
    assert verify(str(tmp_path)) == []


def test_concurrent_parts_equal_a_single_run(tmp_path, whole):
    threads = [threading.Thread(target=write, args=(tmp_path, f"{i}/4")) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path) == content(whole)


def test_more_parts_than_shards(tmp_path, whole):
    results = [write(tmp_path, f"{i}/20") for i in range(20, 0, -1)]
    assert results[-1] is not None
    assert content(tmp_path) == content(whole)


DYING = """
import os, signal, sys
from shards.kit import Toy
from maestro_scale.shards.write.part import WriterPart
from maestro_scale.shards.write.writer import write_shards
def die(done, total, num_bytes):
    if done >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    broken = tuple(sys.argv[3:])
    write_shards(Toy(42, broken), sys.argv[1], "train", shard_mb=float(sys.argv[2]), strict=False,
                 part=WriterPart(2, 3), progress=die)
"""


def test_a_killed_part_is_repeated_alone(tmp_path, whole):
    script, out = tmp_path / "die.py", tmp_path / "out"
    script.write_text(DYING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    dead = subprocess.run(
        [sys.executable, str(script), str(out), str(SMALL), *BROKEN], env=environment, check=False
    )
    assert dead.returncode == -signal.SIGKILL
    assert list(out.glob(".*.tmp"))
    assert write(out, "1/3") is None
    assert write(out, "3/3") is None
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert write(out, "2/3") is not None
    assert content(out) == content(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def test_a_shard_without_valid_tiles_does_not_block_publication(tmp_path):
    from maestro_scale.shards.write.packing import shuffle_keys

    dataset = Toy(12, tuple(shuffle_keys(toy_keys(12), 0)[8:]))  # its last shards
    write(tmp_path / "whole", dataset=dataset)
    assert write(tmp_path / "parts", "2/2", dataset) is None
    published = write(tmp_path / "parts", "1/2", dataset)
    assert published == write(tmp_path / "parts", "1/2", dataset) == write(tmp_path / "parts", "2/2", dataset)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_part_excludes_the_same_part_and_a_full_write(tmp_path):
    with Writer(str(tmp_path), SPEC, "train") as writer:
        writer.add(tile("a"))
        with pytest.raises(WriteError, match="another process is writing split 'train'"):
            write(tmp_path, "1/2")


def test_parts_of_one_folder_have_equal_settings(tmp_path, whole):
    """A part with other tiles would replace shards that another part is about to publish."""
    part = WriterPart(1, 2)
    with Destination(str(tmp_path), SPEC, "train", "raw", 0, part) as destination:
        destination.make_plan(["a", "b"], [PlannedShard(0, 1), PlannedShard(1, 2)])
        with pytest.raises(
            WriteError, match="another part of split 'train' is being written with other tiles"
        ):
            write(tmp_path, "2/2")
    assert write(tmp_path, "2/2") is None
    (tmp_path / ".train.part-1-of-2.lock").write_text("the plan of a killed part")
    assert write(tmp_path, "2/2") is None
    assert write(tmp_path, "1/2") == Manifest.load(str(whole))


def test_a_list_of_tiles_that_changed_between_parts_is_named(tmp_path):
    assert write(tmp_path, "1/2") is None
    with pytest.raises(
        WriteError, match=r"part 2/2 is written, but \d+ shards of other parts .* run the other"
    ):
        write(tmp_path, "2/2", Toy(41, BROKEN))
    assert not (tmp_path / "manifest.json").exists()
    assert write(tmp_path, "1/2", Toy(41, BROKEN)) == Manifest.load(str(tmp_path))
    assert verify(str(tmp_path)) == []


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "-1/2", "a/b", "1/2/3", ""])
def test_an_invalid_part_is_refused(text):
    with pytest.raises(WriteError, match="is not i/n"):
        WriterPart.parse(text)


def test_a_strict_writer_accepts_no_shard_without_its_tiles(tmp_path):
    broken = Toy(12, tuple(toy_keys(12)[3:4]))
    options = {"split": "train", "shard_mb": SMALL}
    part = tmp_path / "part"
    write_shards(broken, str(part), strict=False, part=WriterPart(1, 2), **options)
    write_shards(broken, str(part), strict=False, part=WriterPart(2, 2), **options)
    published = write_shards(Toy(12), str(part), strict=False, **options)
    with pytest.raises(
        WriteError, match=r"without 1 tiles that could not be read \(first: 'Betula_spec.*truncated"
    ):
        write_shards(Toy(12), str(part), strict=True, **options)
    assert Manifest.load(str(part)) == published
    assert verify(str(part)) == []

    (part / "manifest.json").unlink()  # as if killed before the publication
    (part / "manifest.sha256").unlink()
    lacking = next(n for n in range(len(published.shards)) if published.shards[n].samples == 3)
    with pytest.raises(WriteError, match="without 1 tiles"):  # of another part, which may still run
        write_shards(Toy(12), str(part), strict=True, part=WriterPart(2 - lacking % 2, 2), **options)
    manifest = write_shards(Toy(12), str(part), strict=True, **options)
    assert manifest is not None
    assert sum(s.samples for s in manifest.shards) == 12
    assert verify(str(part)) == []
