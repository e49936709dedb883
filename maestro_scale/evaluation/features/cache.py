"""A split as a frozen encoder sees it, on disk: encoded once per (weights, view, data, task), then only read.

A folder appears whole, with a marker of what is in it. Jobs that ask for the same one at once wait for the first; where
they cannot see each other's locks, each encodes it, and the last one stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import ResultsError
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.locks import Locked, file_lock, locks_unsupported
from maestro_scale.shards.progress import Progress
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.distributed import World

log = logging.getLogger(__name__)

_ABANDONED_S = (
    24 * 3600.0
)  # since anything was written to it: where locks do not reach, another job may be at it
_WAIT_S = 1.0  # between looks at what another job encodes


@dataclass(frozen=True)
class FeatureCache:
    """``features`` (M, …, F) and ``labels`` (M, …) of M crops, memory-mapped; ``tiles`` (M,): sample of each crop."""

    features: np.ndarray | ConcatArray | RowSubset
    labels: np.ndarray
    tiles: np.ndarray

    def take(self, rows: np.ndarray) -> FeatureCache:
        """These crops only; features stay where they are, labels come into memory."""
        return FeatureCache(RowSubset(self.features, rows), self.labels[rows], self.tiles[rows])

    def __len__(self) -> int:
        return len(self.tiles)


class ConcatArray:
    """Arrays (M_i, …) as one (M, …), without copying: what is taken of it is copied, whole pieces and chosen rows."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(p) for p in parts])
        self.shape, self.dtype = (int(self._ends[-1]), *parts[0].shape[1:]), parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
        """A slice of crops, or crops by number, or (crops, places) as numpy pairs them."""
        if isinstance(key, slice):
            key = np.arange(len(self))[key]
        rows, *rest = key if isinstance(key, tuple) else (key,)
        which = np.searchsorted(self._ends, rows, side="right")
        taken = np.empty((len(rows), *self.shape[1 + len(rest) :]), self.dtype)
        for i, part in enumerate(self._parts):
            mine = which == i
            first = self._ends[i] - len(part)
            taken[mine] = part[(rows[mine] - first, *(r[mine] for r in rest))]
        return taken

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)


class RowSubset:
    """Some rows of an array (M, …) as one, without copying; taken from as ``ConcatArray`` is."""

    def __init__(self, whole: np.ndarray | ConcatArray, rows: np.ndarray) -> None:
        self._whole, self._rows = whole, rows
        self.shape, self.dtype = (len(rows), *whole.shape[1:]), whole.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
        """As of ``ConcatArray``."""
        rows, *rest = key if isinstance(key, tuple) else (key,)
        return self._whole[(self._rows[rows], *rest)] if rest else self._whole[self._rows[rows]]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self._whole[self._rows].astype(dtype or self.dtype, copy=False)


def concat_features(parts: Sequence[FeatureCache]) -> FeatureCache:
    """Splits one behind the other; features stay where they are, labels of several come into memory."""
    if len(parts) == 1:
        return parts[0]
    firsts = np.cumsum([0, *(int(p.tiles[-1]) + 1 for p in parts[:-1])])
    return FeatureCache(
        ConcatArray([p.features for p in parts]),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([first + p.tiles for first, p in zip(firsts, parts, strict=True)]),
    )


def weights_digest(model: Maestro) -> str:
    """sha256 of a model's configuration and weights."""
    sha = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def cached_features(
    folder: Path,
    loader: EvalLoader,
    features: Callable[[Batch], Tensor],
    labels: Callable[[Batch], np.ndarray],
    dtype: str,
    device: torch.device,
    world: World | None = None,
    progress: ProgressFactory = no_progress,
) -> FeatureCache:
    """What ``features`` and ``labels`` make of every batch of ``loader``; read from ``folder`` if that is there whole.

    Every rank encodes its own batches and writes its own rows; all of them see the folder. ResultsError where the disk
    has no room, or a feature is not finite.
    """
    group, verdicts = _Group(world), {}
    while group.ask_main(lambda: _is_missing(folder, verdicts)):
        with ExitStack() as held:
            if not group.ask_main(lambda: _try_lock(folder, held)):
                time.sleep(_WAIT_S)  # another job is at it
            elif group.ask_main(
                lambda: _is_missing(folder, verdicts)
            ):  # still: it may have ended just before
                with progress(f"encode {folder.name.rpartition('-')[0]}", "batches") as report:
                    _encode(folder, loader, features, labels, dtype, device, group, report)
                verdicts[_marker(folder)] = None  # hashed as it was written
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "labels"))
    return FeatureCache(*arrays, tiles=np.repeat(np.arange(loader.num_samples), loader.num_crops))


@dataclass(frozen=True)
class _Group:
    """The ranks that encode together; alone without ``world``."""

    world: World | None

    @property
    def is_main(self) -> bool:
        return self.world is None or self.world.is_main

    def ask_main(self, question: Callable[[], bool]) -> bool:
        """What rank 0 answers, on all ranks."""
        answer = self.is_main and question()
        return answer if self.world is None else self.world.any(answer)

    def from_main(self, text: str) -> str:
        """Rank 0's text, on all ranks."""
        return text if self.world is None else str(self.world.gather(text)[0])

    def wait(self) -> None:
        if self.world is not None:
            self.world.barrier()


def _is_missing(folder: Path, verdicts: dict[bytes, str | None]) -> bool:
    """Whether there is nothing whole to read. ``verdicts``: by marker, so that each is held against its files once."""
    if not folder.exists():
        return True
    marker = _marker(folder)
    if marker not in verdicts:
        verdicts[marker] = commit.problem(folder, hashes=True)
        if verdicts[marker] is not None:
            log.warning("%s is encoded again: %s", folder, verdicts[marker])
    return verdicts[marker] is not None


def _marker(folder: Path) -> bytes:
    try:
        return (folder / commit.MARKER).read_bytes()
    except OSError:
        return b""


def _try_lock(folder: Path, held: ExitStack) -> bool:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(file_lock(folder.with_name(f".{folder.name}.lock"), wait=False))
    except Locked:
        return False
    except OSError as error:
        if not locks_unsupported(error):
            raise
    for left in folder.parent.glob(f".partial-*-{folder.name}"):
        if time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)  # of a job that was killed
    return True


@torch.no_grad()
def _encode(
    folder: Path,
    loader: EvalLoader,
    features: Callable[[Batch], Tensor],
    labels: Callable[[Batch], np.ndarray],
    dtype: str,
    device: torch.device,
    group: _Group,
    report: Progress,
) -> None:
    rows = loader.num_samples * loader.num_crops
    if rows == 0:
        raise ResultsError("there is no sample to encode: the split is empty")
    # A name of its own: nobody else writes there, and nobody reads.
    partial = folder.with_name(group.from_main(f".partial-{uuid.uuid4().hex[:12]}-{folder.name}"))
    try:
        made, at, num_bytes = None, loader.first_row, 0
        for number, batch in enumerate(loader, 1):
            vectors = _to_storage(features(batch.to(device)), dtype, batch)
            truth = labels(batch)
            if made is None:
                layout = {"features": vectors, "labels": truth}
                made = _create_arrays(
                    partial, {k: ((rows, *v.shape[1:]), v.dtype) for k, v in layout.items()}, group
                )
            made["features"][at : at + len(batch)] = vectors
            made["labels"][at : at + len(batch)] = truth
            at += len(batch)
            num_bytes += vectors.nbytes + truth.nbytes
            report(number, len(loader), num_bytes)
        if made is None:  # more ranks than batches: this one only takes part in the waiting
            group.wait()
        else:
            for array in made.values():
                array.flush()
        group.wait()
        if group.is_main:
            files = {f"{name}.npy": commit.entry(partial / f"{name}.npy") for name in ("features", "labels")}
            commit.commit(partial, {"rows": rows}, files)
            aside = folder.with_name(f".partial-{uuid.uuid4().hex[:12]}-{folder.name}")
            commit.publish(partial, folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
        group.wait()
    finally:
        if group.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def _to_storage(features: Tensor, dtype: str, batch: Batch) -> np.ndarray:
    values = features.float().cpu().numpy()
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        row = int(np.argmin(np.isfinite(stored).reshape(len(stored), -1).all(axis=1)))
        most = np.abs(values[row]).max()
        raise ResultsError(
            f"features of {batch.tiles[row] if batch.tiles else batch.keys[row]} "
            + (f"reach {most:.3g}, more than {dtype} holds" if np.isfinite(most) else "are not finite")
            + ": the encoder overflowed, or saw NaN; see to its weights"
        )
    return stored


def _create_arrays(
    folder: Path, layout: dict[str, tuple[tuple[int, ...], np.dtype]], group: _Group
) -> dict[str, np.memmap]:
    if group.is_main:
        needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise ResultsError(
                f"features need {needed / 2**30:.1f} GiB in {folder.parent}, {free / 2**30:.1f} GiB are free: free "
                "some, point --features at a larger disk, or shard fewer tiles"
            )
        folder.mkdir()
        for name, (shape, dtype) in layout.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    group.wait()
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in layout}
