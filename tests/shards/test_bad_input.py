"""Bad input to the commands: each gives one line that names the file and the cause; no sample is dropped silently."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testkit.runs import Trainer, metrics, write_recipe

from maestro_scale import cli, datasets
from maestro_scale.shards.errors import StoreError, WriteError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.writer import Writer, write_shards
from tests.shards.kit import SPEC, Toy, fields_equal, tile

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch, capsys) -> Command:
    """Runs ``maestro-scale``; (exit code, output, errors)."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["maestro-scale", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A separate file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if (
        sys.platform != "linux"
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("cannot mount a file system here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def copy(synthetic_shards, tmp_path) -> Path:
    """A dataset to damage."""
    return shutil.copytree(synthetic_shards, tmp_path / "shards")


def one_line(done: tuple[int, str, str], exit_code: int = 2) -> str:
    code, _, errors = done
    assert code == exit_code
    (line,) = errors.splitlines()
    return line


def test_truncated_corrupted_and_missing_shards_and_a_newer_manifest(command, copy):
    manifest = Manifest.load(str(copy))
    cut, flipped, gone = (copy / s.path for s in manifest.shards[:3])
    cut.write_bytes(cut.read_bytes()[:-512])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    gone.unlink()
    code, _, errors = command("verify", copy)
    assert code == 1
    causes = dict(line.split(": ", 1) for line in errors.splitlines())
    assert causes.keys() == {s.path for s in manifest.shards[:3]}
    assert "bytes, the manifest says" in causes[cut.name]
    assert "damaged, or another shard" in causes[flipped.name]
    assert causes[gone.name] == "is missing"

    text = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**text, "format_version": 2}))
    (copy / "manifest.sha256").unlink()
    for exit_code, words in ((1, ("verify", copy)), (2, ("inspect", copy))):
        assert (
            "manifest.json: has format version 2, this maestro-scale reads up to 1; upgrade it"
            in one_line(command(*words), exit_code)
        )


def test_a_shard_swapped_between_two_datasets(command, copy, synthetic_raw, tmp_path):
    other = tmp_path / "other"
    # The same names and sizes but other bytes: the order of the samples differs.
    write_shards(
        datasets.open_raw("treesatai_ts", synthetic_raw, "val"), str(other), "val", shard_mb=4, seed=1
    )
    (mine,) = Manifest.load(str(copy)).shards_of(["val"])
    theirs = Manifest.load(str(other)).shards[0]
    assert (mine.path, mine.bytes) == (theirs.path, theirs.bytes)
    shutil.copy(other / mine.path, copy / mine.path)
    line = one_line(command("verify", copy), exit_code=1)
    assert line.startswith(f"{mine.path}: has SHA-256 {theirs.sha256[:12]}…, the manifest says")


@pytest.mark.slow
def test_training_stops_with_the_name_of_a_bad_shard(copy, tmp_path):
    bad = copy / Manifest.load(str(copy)).shards_of(["train"])[1].path
    content = bytearray(bad.read_bytes())
    content[-100_000] ^= 1
    bad.write_bytes(content)
    trainer = Trainer(write_recipe(tmp_path, copy))
    code, output = trainer.run(tmp_path / "run", 1)
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert code == 2
    assert f"{bad}: bad shard: has SHA-256" in line
    assert "Traceback" not in output
    assert not metrics(tmp_path / "run")


def write_own(folder: Path) -> None:
    with Writer(str(folder), SPEC, "train") as writer:
        for i in range(1000):
            writer.add(tile(f"t{i}"))


@pytest.mark.root
def test_a_full_disk(small_disk, tmp_path):
    shards = small_disk / "shards"
    for workers in (1, 2):
        with pytest.raises(
            WriteError, match=r"train-\d+\.tar.*\(No space left on device\); free some disk space"
        ):
            write_shards(Toy(400), str(shards), "train", shard_mb=0.4, workers=workers)
        assert not (shards / "manifest.json").exists()
        assert not list(shards.glob(".*.tmp"))
    # Finished shards are kept and used once there is free space.
    finished = {p.name: p.stat().st_mtime_ns for p in shards.glob("*.tar")}
    assert finished
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    write_shards(Toy(400), str(shards), "train", shard_mb=0.4)
    assert verify(str(shards)) == []
    assert finished.items() <= {p.name: p.stat().st_mtime_ns for p in shards.glob("*.tar")}.items()

    with pytest.raises(
        WriteError, match=r"own: the temporary file cannot be written \(No space left on device\)"
    ):
        write_own(small_disk / "own")
    assert not (small_disk / "own" / "manifest.json").exists()


@pytest.mark.root
def test_a_full_cache(small_disk):
    url = "memory://full/toy"
    manifest = write_shards(Toy(600), url, "train", shard_mb=1.5)
    store = Store(url, small_disk / "cache", 10**9)
    with store.shard(manifest.shards[0]) as shard:
        assert fields_equal(shard[0], tile(shard.keys[0]))
    with pytest.raises(
        StoreError, match=r"no space left for a shard of 2 MB; free some space, or lower data.cache_gib"
    ):
        store.shard(manifest.shards[1])
    shutil.rmtree(small_disk / "cache")
    store.shard(manifest.shards[1]).close()
