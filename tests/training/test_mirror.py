"""The mirror of checkpoints: retention, identity of the run, and no delay of the training."""

from __future__ import annotations

import threading
import time
from functools import partial

import fsspec
import pytest

from maestro_scale import untrusted
from maestro_scale.shards import lease
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.mirror import ForeignMirror, Mirror, MirrorError
from maestro_scale.training.checkpoint.retention import Retention

SEED_3 = {"seed": 3, "model": {"width": 32}}
SEED_5 = {"seed": 5, "model": {"width": 32}}


def checkpoint(folder, step, identity=SEED_3):
    made = folder / f"step_{step:08d}"
    (made / "state").mkdir(parents=True)
    weights = made / "state" / "weights"
    weights.write_bytes(bytes([step]) * 10)
    commit.commit(made, {"identity": identity}, {"state/weights": commit.entry(weights)})
    return made


def mirror(tmp_path, keep=2, keep_every=0, identity=SEED_3):
    made = Mirror(f"file://{tmp_path}/mirror/run", Retention(keep, keep_every))
    made.claim(identity, required=True)
    return made


def there(tmp_path):
    return sorted(int(p.name[5:]) for p in (tmp_path / "mirror" / "run").glob("[!.]*"))


def send(to, *checkpoints):
    for one in checkpoints:
        to.send(one)
        to.wait()


def test_retention_applies_to_the_mirror_independently_of_the_run_directory(tmp_path):
    send(mirror(tmp_path, 1, 4), *(checkpoint(tmp_path / "here", step) for step in (4, 5, 6)))
    assert there(tmp_path) == [4, 6]
    # Fetched onto an empty disk, the run knows nothing of step 4, which is for good.
    again = mirror(tmp_path, 1, 4)
    assert again.names() == ["step_00000006", "step_00000004"]
    again.fetch("step_00000006", tmp_path / "new" / "step_00000006")
    assert commit.problem(tmp_path / "new" / "step_00000006", hashes=True) is None
    send(again, checkpoint(tmp_path / "new", 7))
    assert there(tmp_path) == [4, 7]


def test_another_runs_checkpoints_are_neither_used_nor_removed(tmp_path, caplog):
    send(mirror(tmp_path), checkpoint(tmp_path / "here", 4))
    with pytest.raises(ForeignMirror, match="seed: checkpoint 3, now 5"):
        mirror(tmp_path, identity=SEED_5)
    late = Mirror(f"file://{tmp_path}/mirror/run", Retention(1))  # could not look when it began
    late._identity = SEED_5
    send(late, checkpoint(tmp_path / "other", 9, SEED_5))
    assert "step_00000009 is not mirrored" in caplog.text
    assert there(tmp_path) == [4]


def copies(tmp_path, monkeypatch):
    """Mirrors of two copies of one run, and their checkpoint of the same step with different content."""
    monkeypatch.setattr(lease, "LIFETIME_S", 0.4)
    monkeypatch.setattr(lease, "_CLOCK_S", 0.1)
    mirrors = [mirror(tmp_path) for _ in range(2)]
    mine, theirs = (checkpoint(tmp_path / name, 4) for name in ("here", "copy"))
    (theirs / "state" / "weights").write_bytes(b"of the copy")
    commit.commit(theirs, {"identity": SEED_3}, {"state/weights": commit.entry(theirs / "state" / "weights")})
    return mirrors, mine, theirs


def mirrored(tmp_path):
    return (tmp_path / "mirror" / "run" / "step_00000004" / "state" / "weights").read_bytes()


def test_a_copy_of_a_run_does_not_mirror_while_the_first_does(tmp_path, monkeypatch, caplog):
    (first, second), mine, theirs = copies(tmp_path, monkeypatch)
    first.send(mine)
    while first.unsent:
        time.sleep(0.01)
    send(second, theirs, checkpoint(tmp_path / "copy", 5))
    assert "step_00000005 is not mirrored" in caplog.text
    assert "another process mirrors to it (process " in caplog.text
    assert (mirrored(tmp_path), there(tmp_path)) == (bytes([4]) * 10, [4])
    first.wait()
    caplog.clear()
    send(second, theirs, checkpoint(tmp_path / "copy", 6))
    assert "step_00000004 is not mirrored" in caplog.text
    assert "different content is already there, and is kept" in caplog.text
    assert (mirrored(tmp_path), there(tmp_path)) == (bytes([4]) * 10, [4, 6])


def test_a_mirror_that_lost_its_lease_does_not_overwrite(tmp_path, monkeypatch, caplog):
    """Stopped in the middle of a checkpoint, for longer than its lease."""
    (first, second), mine, theirs = copies(tmp_path, monkeypatch)
    check, checks = first._check_lease, []

    def stop_before_the_marker():
        checks.append(0)
        if len(checks) == 2:
            first._lease._released.set()  # its thread renews no longer
            time.sleep(0.6)
            send(second, theirs)
        check()

    monkeypatch.setattr(first, "_check_lease", stop_before_the_marker)
    send(first, mine)
    assert "another one mirrors to it now" in caplog.text
    assert mirrored(tmp_path) == b"of the copy"
    assert commit.problem(tmp_path / "mirror" / "run" / "step_00000004", hashes=True) is None


def test_equal_checkpoints_are_accepted_and_incomplete_ones_replaced(tmp_path, caplog):
    made = checkpoint(tmp_path / "here", 4)
    weights = tmp_path / "mirror" / "run" / "step_00000004" / "state" / "weights"
    send(mirror(tmp_path), made)
    send(mirror(tmp_path), made)
    weights.write_bytes(b"cut")
    send(mirror(tmp_path), made)
    assert mirrored(tmp_path) == bytes([4]) * 10
    (weights.parents[1] / commit.MARKER).unlink()  # killed before it was complete, with other content
    weights.write_bytes(b"x" * 10)
    (weights.parent / "more").write_bytes(b"x")
    send(mirror(tmp_path), made)
    assert commit.problem(weights.parents[1], hashes=True) is None
    assert [p.name for p in weights.parent.iterdir()] == ["weights"]
    assert caplog.text == ""


def test_a_damaged_marker_in_the_mirror_is_replaced(tmp_path, caplog):
    made = checkpoint(tmp_path / "here", 4)
    copy = tmp_path / "mirror" / "run" / "step_00000004"
    send(mirror(tmp_path), made)
    marker = copy / commit.MARKER
    marker.write_bytes(marker.read_bytes()[:-40])
    (copy / "state" / "weights").write_bytes(b"x" * 10)
    send(mirror(tmp_path), made)
    assert commit.problem(copy, hashes=True) is None
    assert caplog.text == ""


def test_the_marker_of_a_later_revision_is_kept(tmp_path, monkeypatch, caplog):
    made = checkpoint(tmp_path / "here", 4)
    monkeypatch.setattr(commit, "FORMAT_VERSION", 2)
    later = checkpoint(tmp_path / "later", 4)
    monkeypatch.undo()
    marker = tmp_path / "mirror" / "run" / "step_00000004" / commit.MARKER
    marker.parent.mkdir(parents=True)
    marker.write_bytes((later / commit.MARKER).read_bytes())
    to = Mirror(f"file://{tmp_path}/mirror/run", Retention(2))
    send(to, made)
    assert marker.read_bytes() == (later / commit.MARKER).read_bytes()
    assert "step_00000004 is not mirrored" in caplog.text


def test_a_fetch_copies_what_the_marker_lists_and_nothing_else(tmp_path):
    """Other objects may have any size, and keys that are paths elsewhere."""
    made = checkpoint(tmp_path / "here", 4)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.put(f"{made}/", "/evil/step_00000004/", recursive=True)
    fs.pipe("/evil/step_00000004/more", b"x")
    fs.store["/evil/step_00000004/../../../out"] = fs.open("/evil/step_00000004/more", "rb")
    fs.store[f"/evil/step_00000004/{tmp_path}/out"] = fs.open("/evil/step_00000004/more", "rb")
    fs.pipe(f"/evil/step_of/{commit.MARKER}", b"x")
    foreign = Mirror("memory://evil", Retention(1))
    assert foreign.names() == ["step_00000004"]
    into = tmp_path / "a" / "b" / "step_00000004"
    foreign.fetch("step_00000004", into)
    assert sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file()) == [
        "b/step_00000004/COMMIT.json",
        "b/step_00000004/state/weights",
    ]
    assert commit.problem(into, hashes=True) is None
    assert not (tmp_path / "out").exists()


def test_a_marker_that_lists_a_path_elsewhere_is_refused(tmp_path):
    made = tmp_path / "here" / "step_00000004"
    made.mkdir(parents=True)
    commit.commit(made, {"identity": SEED_3}, {"../../out": {"bytes": 1, "sha256": "0"}})
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.put_file(str(made / commit.MARKER), f"/evil/step_00000004/{commit.MARKER}")
    with pytest.raises(MirrorError, match="is not a path below its folder"):
        Mirror("memory://evil", Retention(1)).fetch("step_00000004", tmp_path / "a" / "b" / "c")


def test_a_marker_that_is_too_large_is_not_transferred(tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe(f"/large/step_00000004/{commit.MARKER}", b"x" * 2000)
    monkeypatch.setattr(
        untrusted, "check_size", partial(untrusted.check_size, limits=untrusted.Limits(1000, 1))
    )
    monkeypatch.setattr(type(fs), "cat_file", None)
    with pytest.raises(MirrorError, match="2000 bytes, more than"):
        Mirror("memory://large", Retention(1)).claim({}, required=True)


def test_the_marker_comes_last(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    sent, put = [], LocalFileSystem.put_file

    def put_file(self, path, *args, **named):
        sent.append(path.rpartition("/")[2])
        return put(self, path, *args, **named)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    send(mirror(tmp_path), checkpoint(tmp_path / "here", 4))
    assert sent == ["weights", commit.MARKER]


def sent_slowly(tmp_path, monkeypatch, steps, **policy):
    """(a mirror that has begun with the first of these checkpoints, and does no more until the event is set; the
    event)."""
    slow, begun, go = mirror(tmp_path, **policy), threading.Event(), threading.Event()
    inner = slow._send

    def wait_and_send(path):
        begun.set()
        assert go.wait(20)
        inner(path)

    monkeypatch.setattr(slow, "_send", wait_and_send)
    for step in steps:
        slow.send(checkpoint(tmp_path / "here", step))
        assert begun.wait(20)
    return slow, go


def test_a_slow_mirror_gets_the_newest_checkpoint_only(tmp_path, monkeypatch):
    slow, go = sent_slowly(tmp_path, monkeypatch, (1, 2, 3, 4), keep=9)
    assert slow.unsent == {"step_00000001", "step_00000004"}, "these must not be pruned"
    told = []
    threading.Timer(1.5, go.set).start()
    slow.wait(lambda: told.append(True))
    assert told, "nobody would know that it is alive"
    assert there(tmp_path) == [1, 4]


def test_a_slow_mirror_gets_every_permanent_checkpoint(tmp_path, monkeypatch):
    slow, go = sent_slowly(tmp_path, monkeypatch, (1, 2, 3, 5), keep=1, keep_every=2)
    go.set()
    slow.wait()
    assert there(tmp_path) == [2, 5]


@pytest.mark.slow
@pytest.mark.parametrize("url", ["foo:///x", "s3://nobody-has-this/x"])
def test_an_unreadable_mirror_is_an_error_only_if_it_is_needed(url, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    away = Mirror(url, Retention(1))
    with pytest.raises(MirrorError, match="cannot be read") as raised:
        away.claim(SEED_3, required=True)
    assert "\n" not in str(raised.value)
    away.claim(SEED_3, required=False)
    send(away, checkpoint(tmp_path, 4))
    assert "is not mirrored" in caplog.text
