"""Commit markers: hashes, damage, versions, and publication with one rename."""

from __future__ import annotations

import hashlib
import json

import pytest

from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.folder import newest
from maestro_scale.training.checkpoint.record import CheckpointError


def test_a_checkpoint_of_a_later_format_is_refused_and_stays(tmp_path):
    later = tmp_path / "step_00000005"
    (later / "state").mkdir(parents=True)
    (later / "state" / "weights").write_bytes(b"0123456789")
    files = {"state/weights": commit.entry(later / "state" / "weights")}
    commit.commit(later, {}, files, version=3)
    with pytest.raises(
        commit.NewerFormatError, match=r"step_00000005: COMMIT.json has format version 3, .* up to 2"
    ):
        commit.problem(later)
    commit.commit(later, {}, files)
    assert commit.problem(later, hashes=True) is None
    assert json.loads((later / "COMMIT.json").read_text())["format_version"] == 1


def _checkpoint(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    (folder / "state").mkdir(parents=True)
    weights = folder / "state" / "weights"
    weights.write_bytes(b"x" * 10)
    commit.commit(folder, {"position": {"samples": 48}}, {"state/weights": commit.entry(weights)})
    return folder


def test_half_written_checkpoints_are_never_chosen(tmp_path):
    good, changed, truncated = (_checkpoint(tmp_path, step) for step in (5, 8, 9))
    (truncated / "state" / "weights").write_bytes(b"x" * 9)
    (changed / "state" / "weights").write_bytes(b"x" * 9 + b"y")
    (tmp_path / "checkpoints" / "step_00000012" / "state").mkdir(parents=True)  # no commit marker
    (tmp_path / "checkpoints" / ".staging_step_00000013").mkdir()
    assert "9 bytes instead of 10" in commit.problem(truncated)
    assert commit.problem(changed) is None
    assert "sha256" in commit.problem(changed, hashes=True)
    assert commit.problem(good, hashes=True) is None
    assert newest(tmp_path) == good


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {}}', "{", "null"])
def test_an_unreadable_marker_is_a_damaged_checkpoint(tmp_path, text):
    folder = _checkpoint(tmp_path, 5)
    (folder / commit.MARKER).write_text(text)
    assert "unreadable COMMIT.json" in commit.problem(folder)


def test_a_changed_marker_is_detected(tmp_path):
    marker = _checkpoint(tmp_path, 5) / commit.MARKER
    marker.write_text(marker.read_text().replace('"samples": 48', '"samples": 40'))
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        newest(tmp_path)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        newest(tmp_path)


def write_marker(folder, whole, own=None):
    """A marker with the given content, its own hash by the definition: sha256 of the JSON with sorted keys."""
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / commit.MARKER).write_text(json.dumps({"sha256": own or digest, **whole}))
    return folder


def test_the_entry_of_a_file_has_its_size_and_hash(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # The first test vector of FIPS 180.
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert commit.entry(tmp_path / "abc") == {"bytes": 3, "sha256": sha256}
    (tmp_path / "long").write_bytes(b"x" * (1 << 22) + b"y")  # two blocks
    assert commit.entry(tmp_path / "long")["sha256"] == hashlib.sha256(b"x" * (1 << 22) + b"y").hexdigest()


def test_markers_of_earlier_revisions_have_version_one_and_keys_in_any_order(tmp_path):
    whole = {"files": {}}
    assert commit.read(write_marker(tmp_path / "a", whole)) == whole
    whole = {"step": 5, "files": {}, "a": 1, "format_version": 1}
    assert commit.read(write_marker(tmp_path / "b", whole)) == whole
    with pytest.raises(ValueError, match=r"COMMIT\.json has changed since it was written"):
        commit.read(write_marker(tmp_path / "c", whole, own="0" * 64))


@pytest.mark.parametrize(
    "text", ['["sha256", "files"]', '{"sha256": "0"}', '{"files": {}}', '"sha256 files"']
)
def test_a_marker_without_files_or_its_own_hash_is_refused(text):
    with pytest.raises(ValueError, match="lists no files, or lacks its own hash"):
        commit.content(text)


def test_a_folder_without_a_marker_or_a_file_is_a_problem(tmp_path):
    assert "unreadable COMMIT.json (No such file" in commit.problem(tmp_path)
    folder = _checkpoint(tmp_path, 5)
    (folder / "state" / "weights").unlink()
    assert commit.problem(folder) == "state/weights is missing"


def test_of_the_given_files_the_contents_are_compared(tmp_path):
    entries = {}
    for name in "abc":
        (tmp_path / name).write_bytes(b"1")
        entries[name] = commit.entry(tmp_path / name)
    commit.commit(tmp_path, {}, entries)
    for name in "abc":
        (tmp_path / name).write_bytes(b"2")
        damage = f"{name} has changed since it was written (sha256)"
        assert commit.problem(tmp_path, hashes=True) == damage
        assert commit.damage(tmp_path, {name: entries[name]}, hashes=True) == damage
        others = {other: entry for other, entry in entries.items() if other != name}
        assert commit.damage(tmp_path, others, hashes=True) is None
        assert commit.problem(tmp_path) is None
        (tmp_path / name).write_bytes(b"1")
    assert commit.problem(tmp_path, hashes=True) is None


def test_publishing_moves_a_folder_of_that_name_aside(tmp_path):
    staging, final, aside = tmp_path / "staging", tmp_path / "final", tmp_path / "aside"
    for content in ("1", "2", "3"):
        staging.mkdir()
        (staging / "x").write_text(content)
        commit.publish(staging, final, aside)
        assert (final / "x").read_text() == content
        assert not staging.exists()
        assert aside.exists() == (content != "1")
    # What the second one has moved aside is gone: a kill had left it.
    assert (aside / "x").read_text() == "2"


def test_the_state_of_the_loss_guard_may_be_nan(tmp_path):
    commit.commit(tmp_path, {"mean_loss": float("nan")}, {})
    assert commit.read(tmp_path)["mean_loss"] != commit.read(tmp_path)["mean_loss"]


@pytest.mark.parametrize(
    "listed", [{"bytes": "3", "sha256": "0"}, {"bytes": 3, "sha256": 0}, {"bytes": 3}, 5]
)
def test_an_entry_of_a_file_has_its_size_and_hash(tmp_path, listed):
    with pytest.raises(ValueError, match="COMMIT"):
        commit.read(write_marker(tmp_path / "a", {"files": {"x": listed}}))


def test_an_older_checkpoint_is_not_taken_silently(tmp_path, caplog):
    for step in (4, 6):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"ten  bytes")
        commit.commit(folder, {"step": step}, {"weights": commit.entry(folder / "weights")})
    assert newest(tmp_path).name == "step_00000006"
    assert not caplog.records
    (folder / "weights").write_bytes(b"ten  BYTES")
    assert newest(tmp_path).name == "step_00000004"
    (message,) = caplog.messages
    assert (
        "step_00000004 is used, since newer ones are damaged: step_00000006: weights has changed" in message
    )
