"""Commit markers: hashes, damage, versions, and publication with one rename."""

from __future__ import annotations

import json

import pytest

from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.checkpoints import CheckpointError, newest


def test_a_checkpoint_of_a_later_format_is_refused_and_stays(tmp_path):
    later = tmp_path / "step_00000005"
    (later / "state").mkdir(parents=True)
    (later / "state" / "weights").write_bytes(b"0123456789")
    files = {"state/weights": commit.entry(later / "state" / "weights")}
    commit.commit(later, {"format_version": 2}, files)
    with pytest.raises(
        commit.NewerFormatError, match=r"step_00000005: COMMIT.json has format version 2, .* up to 1"
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
