"""Checkpoints compared with the disk alone, and what rank 0 does for a checkpoint of many ranks.

    python -m benchmarks.checkpoints --work /scratch/checkpoints --mb 200 --rounds 3 --ranks 1024 --parameters 600

Save: the piece of one rank of --mb megabytes, written, flushed and hashed, against a plain write of the same bytes and
fsync. Load: the piece, verified and copied into the training's tensors, against a plain read of the same bytes, both
with the file evicted from the page cache before. By turns, --rounds times; the ratios are within a round.

Publication: --ranks simulated ranks of ZeRO stage 3, each with a slice of each of --parameters parameters. Their small
pieces are written by one process, one after the other, which is not measured. Measured are the parts of a checkpoint in
rank 0's training thread (begin, without the copy of the state; two calls of advance: ``blocked``), what its background
thread does (``publish``), and what one rank does at a resume. ``processor``: of that thread alone.

Prints a table, writes benchmarks/results/checkpoints.json. Exit code 1 with --check if saving or loading is below 0.7
times the rate of the disk, or training is blocked for more than half of --step-s seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from maestro_scale.interop.sharded_state import ParameterSlice, StateReader
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.checkpoint.folder import STATE, staging_of
from maestro_scale.training.checkpoint.pieces import share_of, write_index, write_piece
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.checkpoint.state import TrainState
from maestro_scale.training.distributed import World
from maestro_scale.training.fragments import ShardedState

KINDS = ("weight", "exp_avg", "exp_avg_sq")
MIN_RATIO = 0.7
CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Rank(World):
    """One rank of several whose collectives cost nothing. ``told``: what rank 0 sends to another."""

    local_rank: int = 0
    device: torch.device = CPU
    told: Any = None

    def barrier(self) -> None:
        """No other rank is waited for."""

    def gather(self, value: str | None) -> list[str | None]:
        return [value] * self.size

    def from_main(self, value: T) -> T:
        return value if self.is_main else self.told


class State(TrainState):
    """A rank's slices of a state without a model: equal parts of ``parameters`` tensors of ``numel`` elements each."""

    def __init__(self, rank: int, size: int, parameters: int, numel: int) -> None:
        super().__init__(cast(ShardedState, SimpleNamespace(adam_step=5)), None)  # nothing else of it is read
        first, stop = numel * rank // size, numel * (rank + 1) // size
        values = {kind: torch.full((stop - first,), float(rank)) for kind in KINDS}
        self._slices = [
            ParameterSlice(f"encoder.blocks.{i // 12}.parameter.{i % 12}", (numel,), first, values)
            for i in range(parameters)
        ]

    def pieces(self) -> list[ParameterSlice]:
        return self._slices

    def restore(self, reader: StateReader) -> None:
        for piece in self._slices:
            for kind, values in piece.values.items():
                values.copy_(reader.read(kind, piece.name, piece.start, piece.numel))


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_write(blocks: list[memoryview], path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            file.write(block)
        os.fsync(file.fileno())


def plain_read(path: Path) -> None:
    buffer = bytearray(16 * 2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def measure_disk(work: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    """Seconds of each action in each round, of the hash of processor, and the ratios of the disk's time to ours."""
    numel = megabytes * 10**6 // 12 // 16
    tensors = {f"{kind}/{i}": torch.rand(numel) for kind in KINDS for i in range(16)}
    restored = {name: torch.empty_like(t) for name, t in tensors.items()}
    blocks = [t.numpy().data.cast("B") for t in tensors.values()]
    folder = work / "step_00000001"
    (folder / STATE).mkdir(parents=True)
    found: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": [], "hash": []}
    piece = folder / STATE / "rank00000.safetensors"

    def save() -> None:
        slices = [
            ParameterSlice(str(i), (numel,), 0, {kind: tensors[f"{kind}/{i}"] for kind in KINDS})
            for i in range(16)
        ]
        write_piece(folder / STATE, 0, slices)

    def load() -> None:
        files = commit.read(folder)["files"]
        assert commit.damage(folder, files, hashes=True) is None
        with StateReader(folder / STATE) as reader:
            for name, target in restored.items():
                kind, parameter = name.split("/")
                target.copy_(reader.read(kind, parameter, 0, numel))

    for _ in range(rounds):
        for path in (piece, work / "plain"):
            path.unlink(missing_ok=True)
        found["write"].append(seconds(lambda: plain_write(blocks, work / "plain")))
        found["save"].append(seconds(save))
        entries = write_index(folder / STATE, 1, 5)
        commit.commit(folder, {}, {f"{STATE}/{name}": e for name, e in entries.items()}, version=2)
        os.sync()
        for path in (piece, work / "plain"):
            evict(path)
        found["read"].append(seconds(lambda: plain_read(work / "plain")))
        found["load"].append(seconds(load))
        assert all(torch.equal(restored[name], t) for name, t in tensors.items())
        processor = time.process_time()
        commit.file_sha256(piece)  # from the page cache
        found["hash"].append(time.process_time() - processor)
    size = piece.stat().st_size
    return {
        "bytes": size,
        "seconds": found,
        "save_ratio": [w / s for w, s in zip(found["write"], found["save"], strict=True)],
        "load_ratio": [r / s for r, s in zip(found["read"], found["load"], strict=True)],
        "mb_per_s": {name: size / 1e6 / statistics.median(values) for name, values in found.items()},
    }


def measure_ranks(work: Path, ranks: int, parameters: int, rounds: int) -> dict[str, Any]:
    """Seconds of the parts of a checkpoint of many ranks, in each round."""
    numel = 4 * ranks
    run_dir, pieces = work / f"ranks{ranks}", work / "pieces"
    pieces.mkdir()
    for rank in range(1, ranks):
        write_piece(pieces, rank, State(rank, ranks, parameters, numel).pieces())
    checkpoints = Checkpoints(run_dir, Rank(0, ranks), Retention(1))
    keys = ("blocked_s", "publish_s", "publish_processor_s", "resume_s", "resume_processor_s")
    found: dict[str, Any] = {"ranks": ranks, "parameters": parameters} | {key: [] for key in keys}
    for step in range(1, rounds + 2):
        state = State(0, ranks, parameters, numel)
        begin = partial(checkpoints.begin, state, Position(step, step), {"seed": 0}, {})
        blocked = seconds(begin)
        folder = checkpoints.dir / f"step_{step:08d}"
        shutil.copytree(
            pieces, staging_of(folder) / STATE, dirs_exist_ok=True
        )  # what the other ranks have written
        while checkpoints.busy:
            time.sleep(0.01)
        publish = partial(timed, checkpoints._publish, found)
        with mock.patch.object(checkpoints, "_publish", publish):
            blocked += seconds(checkpoints.advance)
            while checkpoints.busy:
                time.sleep(0.01)
        found["blocked_s"].append(blocked + seconds(checkpoints.advance))
        last = State(ranks - 1, ranks, parameters, numel)
        resuming = Checkpoints(run_dir, Rank(ranks - 1, ranks, told=[folder.name]), Retention(1))
        processor = time.process_time()
        found["resume_s"].append(seconds(partial(resuming.resume, last, {"seed": 0})))
        found["resume_processor_s"].append(time.process_time() - processor)
    for key in keys:
        del found[key][0]  # the first one removes no checkpoint before it
    index = (folder / STATE / name for name in ("index.json", "slices.safetensors"))
    found["index_bytes"] = sum(path.stat().st_size for path in index)
    found["marker_bytes"] = (folder / commit.MARKER).stat().st_size
    found["files_checked_by_a_rank"] = len(share_of(list(commit.read(folder)["files"]), ranks - 1, ranks))
    shutil.rmtree(run_dir)
    shutil.rmtree(pieces)
    return found


def timed(publish: Callable[[Any], None], found: dict[str, Any], pending: Any) -> None:
    """Publish, and add what it took: this is called on the thread that does it."""
    processor, started = time.thread_time(), time.perf_counter()
    publish(pending)
    found["publish_s"].append(time.perf_counter() - started)
    found["publish_processor_s"].append(time.thread_time() - processor)


def main() -> int:
    """Measure, print, write the results; 1 if an aim is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/maestro-checkpoints"))
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--parameters", type=int, default=600)
    parser.add_argument("--step-s", type=float, default=1.0, help="seconds of a training step")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoints.json"))
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    disk = measure_disk(args.work, args.mb, args.rounds)
    of_ranks = [measure_ranks(args.work, ranks, args.parameters, args.rounds) for ranks in args.ranks]
    shutil.rmtree(args.work)
    result = {
        "load_average": os.getloadavg()[0],
        "disk": disk,
        "ranks": of_ranks,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    _print(disk, of_ranks)
    slow = [name for name in ("save_ratio", "load_ratio") if statistics.median(disk[name]) < MIN_RATIO]
    blocked = [r["ranks"] for r in of_ranks if statistics.median(r["blocked_s"]) > args.step_s / 2]
    for name in slow:
        print(f"{name}: {statistics.median(disk[name]):.2f}, the aim is {MIN_RATIO}")
    for ranks in blocked:
        print(f"{ranks} ranks: training is blocked for more than half a step of {args.step_s} s")
    return int(args.check and bool(slow or blocked))


def _print(disk: dict[str, Any], of_ranks: list[dict[str, Any]]) -> None:
    table = Table("", "MB/s", "ratio to the disk", title=f"a piece of {disk['bytes'] / 1e6:.0f} MB")
    for name, ratio in (
        ("write", None),
        ("save", "save_ratio"),
        ("read", None),
        ("load", "load_ratio"),
        ("hash", None),
    ):
        values = disk[ratio] if ratio else []
        text = f"{statistics.median(values):.2f} [{min(values):.2f}–{max(values):.2f}]" if values else ""
        table.add_row(name, f"{disk['mb_per_s'][name]:.0f}", text)
    Console(width=110).print(table)
    names = (
        "blocked_s",
        "publish_s",
        "publish_processor_s",
        "resume_s",
        "resume_processor_s",
    )
    table = Table("ranks", *names, "index MB")
    for r in of_ranks:
        table.add_row(
            str(r["ranks"]),
            *(f"{statistics.median(r[name]):.3f}" for name in names),
            f"{r['index_bytes'] / 1e6:.1f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
