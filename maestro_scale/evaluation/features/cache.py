"""Features of a split on disk: encoded once per (weights, dataset view, data, task), then read by every mode and run.

A folder is published by one rename and ends with a commit marker (sizes and sha256 of its files), so a reader never
sees part of it. The marker also records what the features were computed from, and a reader compares that: the name of
a folder alone proves nothing, since folders can be renamed, copied or restored under another name. Concurrent jobs
that need the same features are serialised by a file lock; on a file system without locks each of them encodes, and
the last rename wins (the contents are equal).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.evaluation.features.arrays import ConcatArray, FeatureArray, RowSubset
from maestro_scale.evaluation.features.on_device import RecipePrecision, map_on_device
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.shards.locks import Locked, file_lock, locks_unsupported
from maestro_scale.shards.progress import Progress
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.distributed import World

log = logging.getLogger(__name__)

# A partial folder of a killed job is removed after this long without a write. Not earlier: where locks do not reach,
# a job on another node may still be writing it.
_ABANDONED_S = 24 * 3600.0
_ARRAYS = ("features", "labels")  # one .npy file each
_INPUTS = "inputs"  # key of the marker: what the features were computed from
_POLL_S = 1.0  # while another job holds the lock


@dataclass(frozen=True)
class FeatureCache:
    """``features`` (M, …, F) and ``labels`` (M, …) of M crops, memory-mapped; ``tiles`` (M,): sample of each crop.

    ``absent`` (M,) text: the sensors that the tile lacks, joined by ``+``; None: every tile has all.
    """

    features: FeatureArray
    labels: np.ndarray
    tiles: np.ndarray
    absent: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> FeatureCache:
        """Only these crops; features stay on disk, labels are read into memory."""
        absent = None if self.absent is None else self.absent[rows]
        return FeatureCache(RowSubset(self.features, rows), self.labels[rows], self.tiles[rows], absent)

    def __len__(self) -> int:
        return len(self.tiles)


def concat_features(parts: Sequence[FeatureCache]) -> FeatureCache:
    """Splits one after the other, tiles numbered on; features stay on disk, labels of several are read into memory."""
    if len(parts) == 1:
        return parts[0]
    firsts = np.cumsum([0, *(int(p.tiles[-1]) + 1 for p in parts[:-1])])
    return FeatureCache(
        ConcatArray([p.features for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([first + p.tiles for first, p in zip(firsts, parts, strict=True)]),
        _concat_absent(parts),
    )


def _concat_absent(parts: Sequence[FeatureCache]) -> np.ndarray | None:
    if all(p.absent is None for p in parts):
        return None
    return np.concatenate([np.full(len(p), "") if p.absent is None else p.absent for p in parts])


class _Config(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


class _Network(Protocol):
    @property
    def config(self) -> _Config: ...

    def state_dict(self) -> dict[str, Any]: ...


def weights_digest(network: _Network) -> str:
    """sha256 of a network's configuration and of its weights by name."""
    sha = hashlib.sha256(json.dumps(network.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def cached_features(
    folder: Path,
    inputs: Mapping[str, Any],
    loader: EvalLoader,
    features: Callable[[Batch], Tensor],
    labels: Callable[[Batch], np.ndarray],
    dtype: str,
    device: torch.device,
    precision: RecipePrecision = "auto",
    world: World | None = None,
    progress: ProgressFactory = no_progress,
) -> FeatureCache:
    """``features`` and ``labels`` of every batch of ``loader``, from ``folder``; encoded first if they are not there.

    ``inputs``: everything that features and labels depend on, as plain JSON values by name; a folder that was made of
    others, or does not say of what, is encoded again. ``labels`` is called with the batch on the host. Every rank
    encodes its own batches and writes its own rows; all of them must see the folder. EvaluationError where the disk
    lacks space, or a feature is not finite.
    """
    group = _Group(world)
    problems: dict[bytes, str | None] = {}
    wanted = {"rows": loader.num_samples * loader.num_crops, "dtype": dtype, **inputs}
    while group.ask_main(lambda: _is_missing(folder, wanted, problems)):
        with ExitStack() as lock:
            if not group.ask_main(lambda: _try_lock(folder, lock)):
                time.sleep(_POLL_S)  # another job is encoding
            # Asked again: that job may have finished between the question and the lock.
            elif group.ask_main(lambda: _is_missing(folder, wanted, problems)):
                encoded = map_on_device(
                    loader, lambda b: {"features": features(b).float()}, device, precision
                )
                with progress(f"encode {folder.name.rpartition('-')[0]}", "batches") as report:
                    _encode(folder, wanted, loader, encoded, labels, group, report)
                problems[_marker(folder)] = None  # hashed while it was written: no need to read it all again
    stored_features, stored_labels = (untrusted.open_npy(folder / f"{name}.npy") for name in _ARRAYS)
    tiles = np.repeat(np.arange(loader.num_samples), loader.num_crops)
    return FeatureCache(stored_features, stored_labels, tiles, loader.absent_of_items())


@dataclass(frozen=True)
class _Group:
    """The ranks that encode together; a single process without ``world``.

    Only rank 0 looks at the file system, and its answer goes to all: ranks that each looked for themselves could see
    different states of a shared file system, and would wait for each other in different collectives.
    """

    world: World | None

    @property
    def is_main(self) -> bool:
        return self.world is None or self.world.is_main

    def ask_main(self, question: Callable[[], bool]) -> bool:
        """Rank 0's answer, on all ranks."""
        answer = self.is_main and question()
        return answer if self.world is None else self.world.any(answer)

    def from_main(self, text: str) -> str:
        """Rank 0's text, on all ranks."""
        return text if self.world is None else str(self.world.gather(text)[0])

    def wait(self) -> None:
        if self.world is not None:
            self.world.barrier()


def _is_missing(folder: Path, wanted: Mapping[str, Any], problems: dict[bytes, str | None]) -> bool:
    """Whether there are no complete features of ``wanted``. ``problems``: by marker, so that files are hashed once per
    marker."""
    if not folder.exists():
        return True
    marker = _marker(folder)
    if marker not in problems:
        # The comparison first: it needs no hashing.
        problems[marker] = _other_inputs(folder, wanted) or commit.problem(folder, hashes=True)
        if problems[marker] is not None:
            log.warning("%s is encoded again: %s", folder, problems[marker])
    return problems[marker] is not None


def _other_inputs(folder: Path, wanted: Mapping[str, Any]) -> str | None:
    """How the recorded inputs of a folder differ from ``wanted``; None if they are the same."""
    try:
        content = commit.read(folder)
    except ValueError as error:
        return str(error)
    if not {f"{name}.npy" for name in _ARRAYS} <= set(content["files"]):
        return f"its {commit.MARKER} does not list {' and '.join(f'{name}.npy' for name in _ARRAYS)}"
    recorded = content.get(_INPUTS)
    if not isinstance(recorded, dict):
        return "it does not record what it was computed from (written by an earlier revision)"
    differences = [
        f"{name}: {shorten(recorded.get(name))}, now {shorten(wanted.get(name))}"
        for name in sorted({*recorded, *wanted})
        if recorded.get(name) != wanted.get(name)
    ]
    return f"it was computed from other inputs ({'; '.join(differences[:5])})" if differences else None


def _marker(folder: Path) -> bytes:
    try:
        return (folder / commit.MARKER).read_bytes()
    except OSError:
        return b""


def _try_lock(folder: Path, stack: ExitStack) -> bool:
    """Lock ``folder`` until ``stack`` closes; False if another job holds it. Removes partial folders of killed jobs."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(file_lock(folder.with_name(f".{folder.name}.lock"), wait=False))
    except Locked:
        return False
    except OSError as error:
        if not locks_unsupported(error):
            raise
    for partial in folder.parent.glob(f".partial-*-{folder.name}"):
        if time.time() - max(p.stat().st_mtime for p in (partial, *partial.iterdir())) > _ABANDONED_S:
            shutil.rmtree(partial, ignore_errors=True)
    return True


def _encode(
    folder: Path,
    inputs: Mapping[str, Any],
    loader: EvalLoader,
    encoded: Iterable[tuple[Batch, Mapping[str, np.ndarray]]],
    labels: Callable[[Batch], np.ndarray],
    group: _Group,
    report: Progress,
) -> None:
    num_rows = loader.num_samples * loader.num_crops
    if num_rows == 0:
        raise EvaluationError("there is no sample to encode: the split is empty")
    # A random name: without locks, another job may be encoding the same features.
    partial = folder.with_name(group.from_main(f".partial-{uuid.uuid4().hex[:12]}-{folder.name}"))
    try:
        arrays: dict[str, np.memmap] | None = None
        row = loader.first_row
        num_bytes = 0
        for number, (batch, found) in enumerate(encoded, 1):
            values = {
                "features": _to_storage(found["features"], inputs["dtype"], batch),
                "labels": labels(batch),
            }
            if arrays is None:  # shapes are known from the first batch
                layout = {name: ((num_rows, *v.shape[1:]), v.dtype) for name, v in values.items()}
                arrays = _create_arrays(partial, layout, group)
            for name, array in arrays.items():
                array[row : row + len(batch)] = values[name]
                num_bytes += values[name].nbytes
            row += len(batch)
            report(number, len(loader), num_bytes)
        if arrays is None:  # more ranks than batches: take part in the barrier of _create_arrays
            group.wait()
        else:
            for array in arrays.values():
                array.flush()
        group.wait()  # every rank's rows are written before rank 0 hashes the files
        if group.is_main:
            files = {f"{name}.npy": commit.entry(partial / f"{name}.npy") for name in _ARRAYS}
            commit.commit(partial, {"rows": num_rows, _INPUTS: dict(inputs)}, files)
            replaced = folder.with_name(f".partial-{uuid.uuid4().hex[:12]}-{folder.name}")
            commit.publish(partial, folder, replaced)
            shutil.rmtree(replaced, ignore_errors=True)
        group.wait()  # no rank opens the folder before it is published
    finally:
        if group.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def _to_storage(values: np.ndarray, dtype: str, batch: Batch) -> np.ndarray:
    """Features as ``dtype``. EvaluationError where one is not finite, or not representable in it."""
    with np.errstate(
        over="ignore"
    ):  # an overflow becomes infinity, and is reported below with the tile's name
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        row = int(np.argmin(np.isfinite(stored).reshape(len(stored), -1).all(axis=1)))
        most = np.abs(values[row]).max()
        raise EvaluationError(
            f"features of {batch.tiles[row] if batch.tiles else batch.keys[row]} "
            + (f"reach {most:.3g}, more than {dtype} holds" if np.isfinite(most) else "are not finite")
            + ": the encoder overflowed or read NaN; check its weights and the data"
        )
    return stored


def _allocate(path: Path) -> None:
    """Reserve the blocks of a sparse file: a write to a mapped page that finds the disk full ends the process by
    SIGBUS."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _create_arrays(
    folder: Path, layout: dict[str, tuple[tuple[int, ...], np.dtype]], group: _Group
) -> dict[str, np.memmap]:
    """Empty arrays on disk, created by rank 0 and opened by every rank. EvaluationError where the disk lacks space."""
    if group.is_main:
        needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
        free = shutil.disk_usage(folder.parent).free
        problem = EvaluationError(
            f"features need {needed / 2**30:.1f} GiB in {folder.parent}, {free / 2**30:.1f} GiB are free: free "
            "some, point --features at a larger disk, or shard fewer tiles"
        )
        if needed > free:
            raise problem
        folder.mkdir()
        for name, (shape, dtype) in layout.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
            try:
                _allocate(folder / f"{name}.npy")
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise problem from error
    group.wait()
    return {name: untrusted.open_npy(folder / f"{name}.npy", "r+") for name in layout}
