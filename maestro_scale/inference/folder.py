"""The folder of predictions: what it contains, which parts are done, and what is put together of them.

Ranks need no communication: each writes parts of its own, renamed into place when they are complete, and one rank puts
the parts of a map together once all are there. The same command continues where a job was killed. Parts and files that
are being written are in ``.parts``, which is removed when everything is complete.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from maestro_scale import untrusted
from maestro_scale.escaping import file_name, ignores_case
from maestro_scale.inference.errors import InferenceError
from maestro_scale.output_folder import check_output
from maestro_scale.unfinished import Unfinished

RECORD = "_predict.json"
_BESIDE = ".aux.xml"
_POLL_S = 0.5


class Folder:
    """An output folder that holds predictions of one model, source and options.

    InferenceError or OutputError if it holds those of others, or files that are none of predictions.
    """

    def __init__(self, path: Path, record: Mapping[str, object]) -> None:
        self.path = path
        self.record = record
        self._unfinished = Unfinished(path)
        path.mkdir(parents=True, exist_ok=True)
        recorded = self._read()
        if recorded is None:
            check_output(path)
            strangers = [p.name for p in sorted(path.iterdir()) if p.suffix in (".tif", ".parquet")]
            if strangers and self._read() is None:
                raise InferenceError(
                    f"{path} has {strangers[0]}, but no {RECORD}: it holds no predictions, and its files would be "
                    "replaced; use another folder"
                )
            self._create(json.dumps(record, indent=1))
            recorded = self._read() or {}
        differences = [f"{k} {recorded.get(k)}, now {v}" for k, v in record.items() if recorded.get(k) != v]
        if differences:
            raise InferenceError(
                f"{path} holds predictions of something else ({'; '.join(differences)}): use another folder"
            )
        self.ignore_case = ignores_case(path)
        self._unfinished.remove_abandoned()

    def file(self, folder: str, key: str, suffix: str) -> Path:
        """The path of a file by its key, which may be any text."""
        # Shortened so that the name of the file beside it, which GDAL determines, is not too long either.
        name = file_name(key, suffix + _BESIDE, self.ignore_case)
        return self.path / folder / name.removesuffix(_BESIDE)

    def part(self, area: int, number: int) -> Path:
        """The file of a part of a map."""
        return self._unfinished.path / f"{area:06d}-{number:06d}.bin"

    def new_file(self, suffix: str = "") -> Path:
        """A path for a file until it is complete, on the same file system as the others."""
        return self._unfinished.new(suffix)

    def write_part(self, path: Path, arrays: Sequence[np.ndarray]) -> None:
        """Write a part, at once: the values of these arrays, one after the other."""
        partial = self.new_file()
        try:
            with partial.open("wb") as file:
                for array in arrays:
                    file.write(np.ascontiguousarray(array).data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def wait_for(self, paths: Sequence[Path], say: Callable[[int], None]) -> None:
        """Return when all these parts are there, which other ranks write; ``say`` is told how many are missing."""
        missing = [p for p in paths if not p.exists()]
        while missing:
            say(len(missing))
            time.sleep(_POLL_S)
            missing = [p for p in missing if not p.exists()]

    def remove_parts(self, paths: Sequence[Path]) -> None:
        """Remove parts that have been put together."""
        for path in paths:
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Everything is complete: remove what killed jobs have left."""
        self._unfinished.remove()

    def _read(self) -> dict[str, object] | None:
        try:
            return untrusted.read_record(self.path / RECORD) or None
        except (OSError, ValueError):
            return None

    def _create(self, text: str) -> None:
        """Create the record, unless another rank has."""
        partial = self.new_file()
        partial.write_text(text)
        try:
            os.link(partial, self.path / RECORD)
        except FileExistsError:
            if self._read() is None:  # damaged
                os.replace(partial, self.path / RECORD)
        except OSError:  # a file system without hard links
            os.replace(partial, self.path / RECORD)
        finally:
            partial.unlink(missing_ok=True)


def unpacked(path: Path, number: int, shapes: Sequence[tuple[tuple[int, ...], str]]) -> np.ndarray:
    """Image ``number`` of a part. InferenceError if it has another size, as a damaged file has."""
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes]
    if path.stat().st_size != sum(sizes):
        raise InferenceError(f"{path}: is damaged; remove it and start again")
    shape, dtype = shapes[number]
    with path.open("rb") as file:
        file.seek(sum(sizes[:number]))
        return np.frombuffer(file.read(sizes[number]), dtype).reshape(shape)
