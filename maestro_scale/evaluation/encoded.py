"""A split as a frozen encoder sees it, on disk: encoded once per (weights, view, data, task), then only read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maestro_scale.evaluation.results import ResultsError
from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.evaluation import EvalLoader
from maestro_scale.training.distributed import World
from maestro_scale.training.run_dir import write_atomically

_COMMIT = "meta.json"


@dataclass(frozen=True)
class Encoded:
    """``features`` (M, …, F) and ``labels`` (M, …) of M crops, memory-mapped; ``tiles`` (M,): sample of each crop."""

    features: np.ndarray | Joined
    labels: np.ndarray
    tiles: np.ndarray

    def take(self, rows: np.ndarray) -> Encoded:
        """These crops only, copied into memory."""
        return Encoded(self.features[rows], self.labels[rows], self.tiles[rows])

    def __len__(self) -> int:
        return len(self.tiles)


class Joined:
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


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Splits one behind the other; features stay where they are, labels of several come into memory."""
    if len(parts) == 1:
        return parts[0]
    firsts = np.cumsum([0, *(int(p.tiles[-1]) + 1 for p in parts[:-1])])
    return Encoded(
        Joined([p.features for p in parts]),
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


def encoded(
    folder: Path,
    loader: EvalLoader,
    features: Callable[[Batch], Tensor],
    labels: Callable[[Batch], np.ndarray],
    dtype: str,
    device: torch.device,
    world: World | None = None,
) -> Encoded:
    """What ``features`` and ``labels`` make of every batch of ``loader``; read from ``folder`` if that is there whole.

    Every rank encodes its own batches and writes its own rows; all of them see the folder. ResultsError where the disk
    has no room.
    """
    if not (folder / _COMMIT).exists():
        _encode(folder, loader, features, labels, dtype, device, world)
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "labels"))
    return Encoded(*arrays, tiles=np.repeat(np.arange(loader.num_samples), loader.num_crops))


@torch.no_grad()
def _encode(
    folder: Path,
    loader: EvalLoader,
    features: Callable[[Batch], Tensor],
    labels: Callable[[Batch], np.ndarray],
    dtype: str,
    device: torch.device,
    world: World | None,
) -> None:
    main, rows = world is None or world.is_main, loader.num_samples * loader.num_crops
    if rows == 0:
        raise ResultsError("there is no sample to encode: the split is empty")
    made, at = None, loader.first_row
    for batch in loader:
        vectors = features(batch.to(device)).float().cpu().numpy().astype(dtype)
        truth = labels(batch)
        if made is None:
            layout = {"features": vectors, "labels": truth}
            made = _open(folder, {k: ((rows, *v.shape[1:]), v.dtype) for k, v in layout.items()}, main, world)
        made["features"][at : at + len(batch)] = vectors
        made["labels"][at : at + len(batch)] = truth
        at += len(batch)
    if made is None:  # more ranks than batches: this one only takes part in the waiting
        _wait(world)
    else:
        for array in made.values():
            array.flush()
    _wait(world)
    if main:
        write_atomically(folder / _COMMIT, json.dumps({"rows": rows, "dtype": dtype}))
    _wait(world)


def _open(
    folder: Path, layout: dict[str, tuple[tuple[int, ...], np.dtype]], main: bool, world: World | None
) -> dict[str, np.memmap]:
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ResultsError(
                f"features need {needed / 2**30:.1f} GiB in {folder}, {free / 2**30:.1f} GiB are free: free some, "
                "point --features at a larger disk, or shard fewer tiles"
            )
        for name, (shape, dtype) in layout.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    _wait(world)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in layout}


def _wait(world: World | None) -> None:
    if world is not None:
        world.barrier()
