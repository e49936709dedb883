"""A real S3 server: writing, verification and training, also with network faults and wrong settings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
from services.s3.server import BUCKET
from shards.kit import SPEC, TILE_BYTES, Toy, Wide, tile
from shards.s3 import Fault, Proxy
from testkit.runs import Trainer, audit, curve, metrics, write_recipe

from maestro_scale import datasets
from maestro_scale.shards.errors import WriteError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.local_storage import ConditionFailed
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.storage import open_storage
from maestro_scale.shards.write.writer import Writer, write_shards
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source
from maestro_scale.stream.workers import start_fork_server

pytestmark = [pytest.mark.root, pytest.mark.slow]
URL = f"s3://{BUCKET}/trees"


def command(env: dict[str, str], *words: str | Path) -> tuple[int, str]:
    """(exit code, output) of ``maestro-scale``."""
    program = Path(sys.executable).parent / "maestro-scale"
    done = subprocess.run(
        [program, *words], env={**os.environ, **env}, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


def error_line(done: tuple[int, str]) -> str:
    """The one line with the reason why a run ended."""
    code, output = done
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert "Traceback" not in output
    assert output.rstrip().endswith(line)
    return line


@pytest.fixture(scope="module")
def s3(ceph):
    """A proxy in front of the server; the environment of this process points to it as well."""
    with Proxy(ceph.port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in ceph.through(proxy.port).items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(autouse=True)
def _no_faults(request):
    if "s3" in request.fixturenames:
        proxy = request.getfixturevalue("s3")
        proxy.faults = lambda method, path, n: None
        proxy.requests.clear()


@pytest.fixture(scope="module")
def dataset(s3, synthetic_raw) -> Manifest:
    """The manifest of the training split at URL, written from the command line."""
    options = ("--split", "train", "--workers", "2", "--shard-mb", "1")
    code, output = command({}, "shard", "treesatai_ts", synthetic_raw, URL, *options)
    assert code == 0, output
    return Manifest.load(URL)


@pytest.fixture(scope="module")
def disk(synthetic_raw, tmp_path_factory) -> Path:
    """The same dataset in a folder."""
    folder = tmp_path_factory.mktemp("disk")
    raw = datasets.open_raw("treesatai_ts", synthetic_raw, "train")
    write_shards(raw, str(folder), "train", shard_mb=1, synthetic=True)
    return folder


@pytest.fixture
def trainer(dataset, tmp_path) -> Trainer:
    """Trains from URL, with a new, empty cache."""
    return Trainer(write_recipe(tmp_path, URL))


@pytest.fixture(scope="module")
def uninterrupted(s3, dataset, tmp_path_factory) -> tuple[Path, Counter]:
    """An undisturbed run of two ranks, and the number of requests for each shard."""
    s3.faults = lambda method, path, n: None
    s3.requests.clear()
    folder = tmp_path_factory.mktemp("uninterrupted")
    Trainer(write_recipe(folder, URL)).train(folder / "run", 2)
    return folder / "run", fetched(s3)


@pytest.fixture
def own(ceph, dataset, tmp_path):
    """URL of a copy of the dataset, to be damaged, and a client."""
    fs, prefix = ceph.files(), f"{BUCKET}/{tmp_path.name}"
    for path in fs.ls(f"{BUCKET}/trees"):
        fs.copy(path, f"{prefix}/{path.rpartition('/')[2]}")
    return f"s3://{prefix}", fs


def without_names(manifest: Manifest) -> Manifest:
    """A manifest without the shards' names, which depend on the storage."""
    return replace(manifest, shards=tuple(replace(info, path="") for info in manifest.shards))


def fetched(s3: Proxy) -> Counter:
    """Requests for the bytes of each shard."""
    return Counter(
        p.rpartition("/")[2] for method, p in s3.requests if method == "GET" and p.endswith(".tar")
    )


def test_the_dataset_equals_the_one_on_disk(dataset, disk):
    assert without_names(dataset) == without_names(Manifest.load(str(disk)))
    code, output = command({}, "verify", URL)
    assert code == 0, output


def test_any_number_of_ranks_train_on_the_same_samples(uninterrupted, trainer, disk, tmp_path):
    run, requests = uninterrupted
    assert set(requests) == {s.path for s in Manifest.load(URL).shards}
    assert set(requests.values()) == {1}  # one download for all ranks of the node
    alone = Trainer(write_recipe(disk, disk)).train(tmp_path / "disk", 1)
    of_four = trainer.train(tmp_path / "four", 4, "--set", "train.micro_batch=2")
    assert audit(tmp_path / "four") == audit(run) == audit(tmp_path / "disk")
    assert curve(of_four) == pytest.approx(curve(alone), rel=1e-5)
    assert curve(metrics(run)) == pytest.approx(curve(alone), rel=1e-5)


def test_network_failures_change_only_the_counters(s3, uninterrupted, trainer, tmp_path):
    kinds = [Fault(500), Fault(cut=True), Fault(hang_s=0.3), Fault(flip=True), Fault(503)]
    seen: list[str] = []

    def faults(method: str, path: str, n: int) -> Fault | None:
        if method != "GET" or not path.endswith(".tar") or path in seen:
            return None
        seen.append(path)
        return kinds[len(seen) % len(kinds)]

    s3.faults = faults
    lines = trainer.train(tmp_path / "run", 2)
    assert curve(lines) == curve(metrics(uninterrupted[0]))
    assert audit(tmp_path / "run") == audit(uninterrupted[0])
    assert len(seen) >= 2 * len(kinds)
    assert lines[-1]["data/retries"] >= 6
    assert lines[-1]["data/refetches"] >= 2
    assert metrics(uninterrupted[0])[-1]["data/retries"] == 0


def test_killed_on_two_ranks_and_continued_on_one(uninterrupted, trainer, tmp_path):
    trainer.kill_at(tmp_path / "run", 2, 3)
    lines = trainer.train(tmp_path / "run", 1)
    assert curve(lines) == pytest.approx(curve(metrics(uninterrupted[0])), rel=1e-5)
    used = audit(tmp_path / "run")
    assert used == audit(uninterrupted[0])
    for epoch in (used[1], used[2], used[3]), (used[4], used[5], used[6]):
        assert len(set().union(*epoch)) == 24  # of 28: the remaining ones are fewer than a batch


def test_a_refused_request_stops_the_run_at_once(s3, trainer, tmp_path):
    s3.faults = lambda method, path, n: Fault(403) if path.endswith(".tar") else None
    line = error_line(trainer.run(tmp_path / "run", 1))
    assert f"{URL}/train-" in line
    assert "check credentials" in line
    asked = Counter(p for _, p in s3.requests if p.endswith(".tar"))
    # Once while the loader processes start, once by their prefetch, and once when it was needed.
    assert max(asked.values()) <= 3
    assert not metrics(tmp_path / "run")


def test_wrong_credentials_and_no_response_give_one_line(s3, trainer, tmp_path):
    trainer.env = {"AWS_SECRET_ACCESS_KEY": "wrong"}
    assert f"{URL}/manifest.json: refused" in error_line(trainer.run(tmp_path / "run", 1))
    trainer.env = {}
    s3.faults = lambda method, path, n: Fault(hang_s=60) if path.endswith(".tar") else None
    line = error_line(trainer.run(tmp_path / "run", 1, "--set", "data.retry_s=3"))
    assert f"{URL}/train-" in line
    assert "gave up after" in line


def test_damaged_datasets_are_reported(own, trainer, tmp_path):
    url, fs = own
    manifest = Manifest.load(url)
    cut, swapped, *_ = (f"{url}/{s.path}" for s in manifest.shards)
    whole, other = fs.cat(cut), fs.cat(swapped)
    trainer.recipe.write_text(trainer.recipe.read_text().replace(URL, url))

    fs.pipe(cut, whole[:-2048])
    fs.pipe(swapped, other[:-2000] + whole[-2000:])  # the same size, with bytes of another dataset
    code, output = command({}, "verify", url)
    assert code == 1
    assert f"{manifest.shards[0].path}: " in output
    assert f"{manifest.shards[1].path}: " in output
    line = error_line(trainer.run(tmp_path / "run", 1))
    assert f"{url}/train-" in line
    assert "bad shard: " in line
    fs.pipe(swapped, other)
    lines = trainer.train(
        tmp_path / "replaced", 2, "--set", "data.on_bad_shard=replace", "data.shuffle_window=4"
    )
    assert lines[-1]["data/replaced"] > 0
    assert [len(keys) for keys in audit(tmp_path / "replaced").values()] == [8] * 6

    newer = json.loads(fs.cat(f"{url}/manifest.json"))
    newer["format_version"] = newer["format_version"] + 1
    fs.pipe(f"{url}/manifest.json", json.dumps(newer).encode())
    fs.rm(f"{url}/manifest.sha256")
    assert re.search(f"{url}/manifest.json: .*version", error_line(trainer.run(tmp_path / "newer", 1)))


WRITE = """
import sys
from shards.kit import Wide
from maestro_scale.shards.storage import open_storage
from maestro_scale.shards.write.writer import Writer, write_shards
if __name__ == "__main__":
    write_shards(Wide(9), sys.argv[1], "train", shard_mb=40)
"""


def test_a_killed_upload_in_parts_is_resumed(s3, tmp_path):
    url, script = f"s3://{BUCKET}/wide", tmp_path / "write.py"
    script.write_text(WRITE)
    s3.faults = lambda method, path, n: (
        Fault(hang_s=60) if "train-000001-" in path and "partNumber=2" in path else None
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, str(script), url], env=environment)
    until = time.monotonic() + 120
    while not any("train-000001-" in p and "partNumber=2" in p for _, p in s3.requests):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any("train-000000-" in p and "partNumber=3" in p for _, p in s3.requests)
    assert not any("manifest.json" in p for m, p in s3.requests if m in ("PUT", "POST"))

    s3.faults = lambda method, path, n: None
    s3.requests.clear()
    manifest = write_shards(Wide(9), url, "train", shard_mb=40)
    assert not any("train-000000-" in p for m, p in s3.requests if m in ("PUT", "POST"))
    on_disk = write_shards(Wide(9), str(tmp_path / "disk"), "train", shard_mb=40)
    assert without_names(manifest) == without_names(on_disk)
    assert verify(url) == []


def test_two_writers_exclude_each_other(s3):
    """With the conditional requests of a real server, which are tried out by the first lease."""
    url = f"s3://{BUCKET}/writers"
    with Writer(url, SPEC, "train") as writer:
        writer.add(tile("a"))
        assert writer._destination.storage.conditional
        s3.requests.clear()
        with pytest.raises(WriteError, match=r"another process is writing split 'train'.* expires in \d+ s"):
            write_shards(Toy(3), url, "train")
        assert {method for method, _ in s3.requests} <= {"GET", "HEAD"}  # it has written nothing
        write_shards(Toy(3), url, "val")
        held = open_storage(url).read_snapshot(".train.lease")
        assert 0 <= held.age_s < 60
    assert Manifest.load(url).splits == ("val", "train")
    assert verify(url) == []


def test_the_manifest_is_replaced_only_if_it_has_not_changed(s3):
    """Every other writer adds a split between the reading and the writing of the manifest."""
    url = f"s3://{BUCKET}/merged"
    write_shards(Toy(2), url, "first")
    storage = open_storage(url)
    storage.write_snapshot("probe", b"1", None)
    manifest = storage.read_snapshot("manifest.json")
    write_shards(Toy(3), url, "second")
    with pytest.raises(ConditionFailed):
        storage.write_snapshot("manifest.json", manifest.data, manifest)
    with pytest.raises(ConditionFailed):
        storage.write_snapshot("manifest.json", manifest.data, None)
    now = storage.read_snapshot("manifest.json")
    assert storage.write_snapshot("manifest.json", now.data, now) is not None
    assert Manifest.load(url).splits == ("first", "second")


def test_the_first_batch_waits_only_for_its_own_shards(s3, tmp_path):
    url = f"s3://{BUCKET}/many"
    manifest = write_shards(Toy(96), url, "train", shard_mb=2 * TILE_BYTES / 1e6)
    assert len(manifest.shards) >= 32
    s3.faults = lambda method, path, n: Fault(hang_s=0.1) if path.endswith(".tar") else None
    s3.requests.clear()
    source = Source(SPEC, manifest.shards_of(["train"]), Store(url, tmp_path, 2**30))
    loader = TrainLoader(
        [source], 0, lanes=2, global_batch=4, micro_batch=4, rank=0, world=1, workers=1, window=4
    )
    steps = loader.steps(0, 20)
    first = next(steps)
    asked = fetched(s3)
    loader.close()
    needed = {manifest.shards[source_shard(source, key)].path for b in first.batches for key in b.keys}
    assert needed <= set(asked)
    assert len(asked) <= len(needed) + 4  # started in the meantime, two at a time


def test_loader_processes_use_the_current_credentials(s3, tmp_path, monkeypatch):
    """The fork server may be older than the credentials: in a notebook they may be set after a first attempt."""
    url = f"s3://{BUCKET}/late"
    manifest = write_shards(Toy(8), url, "train")
    source = Source(SPEC, manifest.shards_of(["train"]), Store(url, tmp_path, 2**30))
    forkserver._forkserver._stop()
    with monkeypatch.context() as before:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            before.delenv(name)
        start_fork_server([source])
    loader = TrainLoader(
        [source], 0, lanes=2, global_batch=4, micro_batch=4, rank=0, world=1, workers=1, window=4
    )
    assert next(loader.steps(0, 2)).batches
    loader.close()


def source_shard(source: Source, key: str) -> int:
    """The shard that contains a sample."""
    number, start = int(key.rpartition("/")[2]), 0
    for i, count in enumerate(source.counts):
        start += count
        if number < start:
            return i
    raise AssertionError(key)
