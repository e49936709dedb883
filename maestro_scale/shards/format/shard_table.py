"""The shards of a dataset as columns of numbers, for manifests with hundreds of thousands of shards.

A :class:`ShardInfo` is made when it is asked for. A table in a file is mapped, so that all processes of a node share
its memory; a process that is handed it gets the path of the file and the range of rows. A table in memory is handed to
a process of ``multiprocessing`` as torch hands over its tensors: in shared memory, of which the process gets a handle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.spec import OMIT_DEFAULT

# ``path``, ``path_bytes``: where the path is in the text of the table. ``split``, ``absent``: numbers.
_ROW = np.dtype(
    [
        ("bytes", "<i8"),
        ("samples", "<i8"),
        ("path", "<i8"),
        ("path_bytes", "<i4"),
        ("split", "<i4"),
        ("absent", "<i4"),
        ("sha256", "S64"),
    ]
)


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of a dataset."""

    path: str  # relative to the dataset's root, with forward slashes
    split: str
    bytes: int
    samples: int
    sha256: str  # of the whole file, in lower-case hexadecimal
    absent: tuple[str, ...] = field(default=(), metadata=OMIT_DEFAULT)  # modalities that all its tiles lack


@dataclass(frozen=True)
class _Range:
    """Rows [start, stop) of the table in a file."""

    path: Path
    start: int
    stop: int


class ShardTable(Sequence[ShardInfo]):
    """A sequence of shards; ``take`` and ``of_split`` give parts of it without a copy where these are contiguous.

    ``splits``: names that ``split_ids`` number; ``absents``: the sets of absent modalities that ``absent_ids`` number.
    """

    def __init__(
        self,
        rows: np.ndarray,
        text: np.ndarray,
        splits: tuple[str, ...],
        absents: tuple[tuple[str, ...], ...],
        mapped: _Range | None = None,
    ) -> None:
        self._rows, self._text, self.splits, self.absents, self._mapped = rows, text, splits, absents, mapped
        self._shared: tuple[Any, ...] | None = None  # rows and text in shared memory, as tensors

    @classmethod
    def of(cls, shards: Iterable[ShardInfo]) -> ShardTable:
        """The table of these shards."""
        if isinstance(shards, ShardTable):
            return shards
        splits: dict[str, int] = {}
        absents: dict[tuple[str, ...], int] = {}
        rows, paths, reached = [], [], 0
        for s in shards:
            path = s.path.encode()
            split = splits.setdefault(s.split, len(splits))
            absent = absents.setdefault(s.absent, len(absents))
            rows.append((s.bytes, s.samples, reached, len(path), split, absent, s.sha256.encode()))
            paths.append(path)
            reached += len(path)
        text = np.frombuffer(b"".join(paths), np.uint8)
        return cls(np.array(rows, _ROW), text, tuple(splits), tuple(absents))

    @property
    def samples(self) -> np.ndarray:
        """(shards,) int64: the number of samples of each."""
        return self._rows["samples"].astype(np.int64, copy=False)

    @property
    def bytes(self) -> np.ndarray:
        """(shards,) int64: the size of each."""
        return self._rows["bytes"].astype(np.int64, copy=False)

    @property
    def absent_ids(self) -> np.ndarray:
        """(shards,) int64: which of ``absents`` the tiles of each lack."""
        return self._rows["absent"].astype(np.int64, copy=False)

    def take(self, numbers: np.ndarray) -> ShardTable:
        """The shards with these numbers, in this order."""
        first = int(numbers[0]) if len(numbers) else 0
        stop = first + len(numbers)
        if np.array_equal(numbers, np.arange(first, stop)):
            return self[first:stop]
        return ShardTable(self._rows[numbers], self._text, self.splits, self.absents)

    def of_splits(self, splits: Sequence[str]) -> ShardTable:
        """The shards of these splits, one split after the other. KeyError for a split without shards."""
        known = {name: number for number, name in enumerate(self.splits)}
        column = self._rows["split"]
        return self.take(np.concatenate([np.flatnonzero(column == known[name]) for name in splits]))

    def as_dicts(self) -> list[dict[str, Any]]:
        """What ``to_builtins`` makes of the shards, without an object for each."""
        text = self._text.tobytes()
        dicts = []
        for num_bytes, samples, path, path_bytes, split, absent, sha256 in self._rows.tolist():
            shard = {
                "path": text[path : path + path_bytes].decode(),
                "split": self.splits[split],
                "bytes": num_bytes,
                "samples": samples,
                "sha256": sha256.decode(),
            }
            if self.absents[absent]:
                shard["absent"] = list(self.absents[absent])
            dicts.append(shard)
        return dicts

    def tensors(self) -> dict[str, np.ndarray]:
        """What :meth:`map` needs in a file, beside ``splits`` and ``absents``: arrays of bytes."""
        return {"rows": self._rows.view(np.uint8), "text": self._text}

    @classmethod
    def map(cls, path: Path, splits: tuple[str, ...], absents: tuple[tuple[str, ...], ...]) -> ShardTable:
        """The table in a safetensors file with ``tensors``. InputError; OSError if there is no file."""
        rows, text = _mapped_arrays(path)
        return cls(rows, text, splits, absents, _Range(path, 0, len(rows)))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, number: slice) -> ShardTable: ...
    def __getitem__(self, number: int | slice) -> ShardInfo | ShardTable:
        if not isinstance(number, slice):
            return self._info(self._rows[number].tolist())
        start, stop, step = number.indices(len(self))
        mapped = self._mapped
        if mapped is not None:
            first = mapped.start + start
            mapped = _Range(mapped.path, first, first + max(stop - start, 0)) if step == 1 else None
        return ShardTable(self._rows[number], self._text, self.splits, self.absents, mapped)

    def __iter__(self) -> Iterator[ShardInfo]:
        return map(self._info, self._rows.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"ShardTable of {len(self)} shards"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._mapped is not None:
            return _map_range, (self._mapped, self.splits, self.absents)
        if self._shared is None:
            import torch  # not needed to read a manifest

            arrays = (_writable(a).view(np.uint8) for a in (self._rows, self._text))
            # Kept: the process that is started gets the handles only after everything for it is pickled.
            self._shared = tuple(torch.from_numpy(a).share_memory_() for a in arrays)
        return _of_tensors, (*self._shared, self.splits, self.absents)

    def _info(self, row: tuple[Any, ...]) -> ShardInfo:
        num_bytes, samples, path, path_bytes, split, absent, sha256 = row
        text = self._text[path : path + path_bytes].tobytes().decode()
        return ShardInfo(text, self.splits[split], num_bytes, samples, sha256.decode(), self.absents[absent])


def _mapped_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    tensors = untrusted.load_tensors(path)
    try:
        rows = tensors["rows"].numpy().view(_ROW).reshape(-1)
        return rows, tensors["text"].numpy()
    except (KeyError, ValueError, TypeError) as error:
        raise untrusted.InputError(f"{path}: has no rows of shards ({error})") from None


def _map_range(mapped: _Range, splits: tuple[str, ...], absents: tuple[tuple[str, ...], ...]) -> ShardTable:
    rows, text = _mapped_arrays(mapped.path)
    return ShardTable(rows[mapped.start : mapped.stop], text, splits, absents, mapped)


def _of_tensors(
    rows: Any, text: Any, splits: tuple[str, ...], absents: tuple[tuple[str, ...], ...]
) -> ShardTable:
    return ShardTable(rows.numpy().view(_ROW), text.numpy(), splits, absents)


def _writable(array: np.ndarray) -> np.ndarray:
    """torch has no tensors of memory that must not be written."""
    contiguous = np.ascontiguousarray(array)
    return contiguous if contiguous.flags.writeable else contiguous.copy()
