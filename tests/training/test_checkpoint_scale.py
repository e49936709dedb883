"""What a checkpoint costs with many ranks, simulated one after the other: files touched, training blocked."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maestro_scale.interop import tensors
from maestro_scale.interop.sharded_state import ParameterSlice
from maestro_scale.training.checkpoint import checkpoints as module
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.checkpoint.pieces import share_of, write_piece
from maestro_scale.training.checkpoint.record import CheckpointError, Position
from maestro_scale.training.checkpoint.retention import Retention

NUM_PARAMETERS, NUMEL = 3, 32


@dataclass
class OneOfMany:
    """A rank whose collectives get the same from all others; ``told``: what rank 0 says."""

    rank: int
    size: int
    told: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        pass

    def gather(self, value):
        return [value] * self.size

    def from_main(self, value):
        return value if self.is_main else self.told


class State:
    """Of one rank, with ZeRO stage 3: an equal part of each parameter, whose element i is i."""

    def __init__(self, rank: int, size: int) -> None:
        self.part, self.first = NUMEL // size, NUMEL // size * rank
        self.sharded = SimpleNamespace(adam_step=0)
        self.restored: dict[str, list[float]] = {}

    def pieces(self) -> list[ParameterSlice]:
        values = torch.arange(self.first, self.first + self.part, dtype=torch.float32)
        return [
            ParameterSlice(f"block.{i}", (NUMEL,), self.first, {"weight": values})
            for i in range(NUM_PARAMETERS)
        ]

    def restore(self, reader) -> None:
        for name in reader.shapes:
            self.restored[name] = reader.read("weight", name, self.first, self.part).tolist()


def save(run_dir: Path, num_ranks: int, step: int = 4, **options) -> Checkpoints:
    """Write the checkpoint of all ranks; rank 0 has not published it yet."""
    checkpoints = Checkpoints(run_dir, OneOfMany(0, num_ranks), Retention(2), **options)
    checkpoints.begin(State(0, num_ranks), Position(8, step), {"seed": 3}, {})
    staging = run_dir / "checkpoints" / f".staging_step_{step:08d}" / "state"
    for rank in range(1, num_ranks):
        write_piece(staging, rank, State(rank, num_ranks).pieces())
    return checkpoints


@pytest.fixture
def touched(monkeypatch):
    """Counts of what is done to files: calls of stat, files opened to read (names), bytes hashed from files (names)."""
    found = SimpleNamespace(stats=0, opened=[], hashed=[])
    stat, io_open, file_sha256 = os.stat, io.open, commit.file_sha256

    def counting_stat(path, *args, **kwargs):
        found.stats += "step_" in str(path)
        return stat(path, *args, **kwargs)

    def counting_open(path, mode="r", *args, **kwargs):
        if "step_" in str(path) and "r" in mode:
            found.opened.append(Path(path).name)
        return io_open(path, mode, *args, **kwargs)

    def counting_sha256(path):
        found.hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(os, "stat", counting_stat)
    monkeypatch.setattr(io, "open", counting_open)
    monkeypatch.setattr(commit, "file_sha256", counting_sha256)
    if accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10 keeps both functions there
        monkeypatch.setattr(accessor, "open", staticmethod(counting_open))
        monkeypatch.setattr(accessor, "stat", staticmethod(counting_stat))
    return found


def test_a_piece_is_not_read_again_to_be_hashed(tmp_path, touched):
    (tmp_path / "step_1").mkdir()
    write_piece(tmp_path / "step_1", 0, State(0, 1).pieces())
    assert touched.hashed == []
    assert touched.opened == []


def test_training_waits_neither_for_the_records_of_ranks_nor_for_the_removal_of_old_checkpoints(
    tmp_path, monkeypatch
):
    release, threads = threading.Event(), []

    def slow(action):
        def call(*args, **kwargs):
            threads.append((action.__name__, threading.current_thread() is threading.main_thread()))
            assert release.wait(30)
            return action(*args, **kwargs)

        return call

    for name in ("write_index", "prune"):
        monkeypatch.setattr(module, name, slow(getattr(module, name)))
    checkpoints = save(tmp_path, 16)
    done: list[Position] = []
    checkpoints.on_commit = done.append
    while checkpoints.busy:
        pass
    checkpoints.advance()  # returns although rank 0 still publishes
    assert checkpoints.busy
    assert checkpoints.pending
    assert done == []
    assert not (tmp_path / "latest").exists()
    release.set()
    checkpoints.finish()
    assert done == [Position(8, 4)]
    assert not checkpoints.pending
    assert threads == [("write_index", False), ("prune", False)]
    assert (tmp_path / "latest").read_text() == "step_00000004\n"


def test_the_marker_has_the_hash_of_every_file_and_no_record_of_a_rank_is_left(tmp_path):
    save(tmp_path, 16).finish()
    folder = tmp_path / "checkpoints" / "step_00000004"
    content = commit.read(folder)
    assert content["format_version"] == 2
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    pieces = [f"state/rank{rank:05d}.safetensors" for rank in range(16)]
    assert names == ["COMMIT.json", "state/index.json", *pieces, "state/slices.safetensors"]
    assert sorted(content["files"]) == names[1:]
    for name, entry in content["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert commit.problem(folder, hashes=True) is None


@pytest.mark.parametrize("num_ranks", [4, 16, 32])
def test_a_resume_touches_as_many_files_with_more_ranks(tmp_path, touched, num_ranks):
    save(tmp_path, num_ranks).finish()
    state = State(3, num_ranks)
    touched.stats, touched.opened, touched.hashed = 0, [], []
    resumed = Checkpoints(tmp_path, OneOfMany(3, num_ranks, ["step_00000004"]), Retention(2)).resume(
        state, {"seed": 3}
    )
    assert resumed.position == Position(8, 4)
    first = NUMEL // num_ranks * 3
    expected = list(range(first, first + NUMEL // num_ranks))
    assert state.restored == {f"block.{i}": expected for i in range(NUM_PARAMETERS)}
    # Rank 3 checks and loads its own piece. Nobody else's: each is checked by its rank.
    assert touched.hashed == ["rank00003.safetensors"]
    assert touched.opened.count("COMMIT.json") == 2
    assert touched.stats <= 10
    everyone = [
        name for rank in range(num_ranks) for name in share_of(["b", "rank1", "rank0", "a"], rank, num_ranks)
    ]
    assert sorted(everyone) == ["a", "b", "rank0", "rank1"]


def test_a_file_of_another_rank_that_is_damaged_is_found_by_that_rank(tmp_path):
    save(tmp_path, 4).finish()
    folder = tmp_path / "checkpoints" / "step_00000004"
    for name in ("rank00002.safetensors", "index.json", "slices.safetensors"):
        path = folder / "state" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        problems = [
            Checkpoints(tmp_path, OneOfMany(rank, 4), Retention(2))._problem_of_share(folder)
            for rank in range(4)
        ]
        assert [p for p in problems if p] == [f"state/{name} has changed since it was written (sha256)"]
        path.write_bytes(data)


def test_a_rank_that_could_not_write_prevents_the_checkpoint(tmp_path):
    checkpoints = save(tmp_path, 4)
    (tmp_path / "checkpoints/.staging_step_00000004/state/rank00002.part").unlink()
    with pytest.raises(CheckpointError, match="step_00000004 cannot be written: No such file"):
        checkpoints.finish()
    assert not (tmp_path / "latest").exists()
    assert list((tmp_path / "checkpoints").glob("step_*")) == []


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "rank00001.part: is not a valid safetensors file"),
        (None, "block.0: its slices cover the elements"),
    ],
    ids=["empty", "of another rank"],
)
def test_a_record_that_is_damaged_prevents_the_checkpoint(tmp_path, content, cause):
    checkpoints = save(tmp_path, 2)
    state = tmp_path / "checkpoints/.staging_step_00000004/state"
    checkpoints._pending.task.result()
    (state / "rank00001.part").write_bytes(
        (state / "rank00000.part").read_bytes() if content is None else content
    )
    with pytest.raises(CheckpointError, match=f"step_00000004 cannot be written: {cause}"):
        checkpoints.finish()
    assert list((tmp_path / "checkpoints").glob("step_*")) == []


@pytest.mark.parametrize("at", ["write_index", "commit", "publish", "write_atomically", "prune"])
def test_a_kill_at_any_point_of_the_publication_leaves_the_old_or_the_new_checkpoint(
    tmp_path, monkeypatch, at
):
    save(tmp_path, 4, step=2).finish()
    owner = commit if at in ("commit", "publish") else module

    class Killed(Exception):
        pass

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(owner, at, killed)
    with pytest.raises(Killed):
        save(tmp_path, 4, step=4).finish()
    monkeypatch.undo()
    found, problems = Checkpoints(tmp_path, OneOfMany(0, 4), Retention(2)).latest()
    assert found is not None
    assert problems == []
    assert found.name == ("step_00000004" if at in ("write_atomically", "prune") else "step_00000002")
    save(tmp_path, 4, step=6).finish()  # removes what the kill has left
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert (
        left == [found.name, "step_00000006"] if at != "prune" else left == ["step_00000004", "step_00000006"]
    )


def test_blocks_are_hashed_while_others_are_written(tmp_path, monkeypatch):
    """The hash needs another thread than the write: one after the other, they would take the sum of their times."""
    threads = set()
    real = tensors.hashlib.sha256

    class Hash:
        def __init__(self, *args):
            self.real = real(*args)

        def update(self, data):
            threads.add(threading.current_thread() is threading.main_thread())
            self.real.update(data)

        def hexdigest(self):
            return self.real.hexdigest()

    monkeypatch.setattr(tensors, "hashlib", SimpleNamespace(sha256=Hash))
    tensors.write_tensors_hashed({"a": torch.ones(5)}, tmp_path / "x")
    tensors.file_sha256(tmp_path / "x")
    assert threads == {False}
