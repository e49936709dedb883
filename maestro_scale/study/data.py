"""The data of a study: its identity, its place below the root, and the synthetic shards, which are written once."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetError, RawDataset, Tile
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.locks import file_lock
from maestro_scale.shards.write.grouping import absent_from
from maestro_scale.shards.write.packing import shuffle_keys
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.study.config import Data
from maestro_scale.training.run_dir import write_atomically

_PACKAGE = Path(datasets.__file__).parent
_READING = ("fill.py", "quantity.py", "raster_file.py", "raw.py", "values.py")
_DONE = "complete.json"
_SHARD_MB = 32
_SPLITS = ("train", "val", "test")


def identity(data: Data) -> dict[str, Any]:
    """What determines the samples: the address of existing shards; of synthetic data the numbers, the seed and the
    code that generates the scenes."""
    if data.shards is not None:
        return {"dataset": data.dataset, "shards": data.shards}
    return {
        "dataset": data.dataset,
        "tiles": dict(data.tiles),
        "seed": data.seed,
        "generator": generator_digest(data.dataset),
        **({} if data.window_m is None else {"window_m": data.window_m}),
    }


@cache
def generator_digest(dataset: str) -> str:
    """Hash of the code that generates the scenes of a dataset, reads them, and draws their splits, without comments and
    docstrings: tiles of another revision of the code must not count as the same data."""
    sources = [(path.name, path.read_text()) for path in generator_files(dataset)]
    sources.append((shuffle_keys.__name__, inspect.getsource(shuffle_keys)))
    digest = hashlib.sha256()
    for name, source in sources:
        digest.update(f"{name}\0{_code(source)}\0".encode())
    return digest.hexdigest()[:16]


def generator_files(dataset: str) -> list[Path]:
    """The modules that decide what is in the synthetic tiles of a dataset."""
    files = [*(_PACKAGE / "synthetic").glob("*.py"), *(_PACKAGE / name for name in _READING)]
    if dataset in datasets.known():
        files += datasets.folder(dataset).glob("*.py")
    return sorted(files)


def place(data: Data, root: Path) -> str:
    """Address of the shards."""
    if data.shards is not None:
        return data.shards
    digest = hashlib.sha256(json.dumps(identity(data), sort_keys=True).encode()).hexdigest()
    return str(root / "data" / f"{data.dataset}-{digest[:10]}")


def is_complete(data: Data, root: Path) -> bool:
    """Whether the shards exist, as far as the study writes them."""
    return data.shards is not None or (Path(place(data, root)) / _DONE).exists()


def write(data: Data, root: Path, workers: int = 2) -> None:
    """Write the synthetic shards unless they exist; interrupted, the same call resumes. Waits for another process that
    writes them. DatasetError where that is impossible."""
    if is_complete(data, root):
        remove_leftovers(data, root)
        return
    if data.dataset not in datasets.known():
        known = ", ".join(datasets.known())
        raise DatasetError(
            f"{data.dataset}: no synthetic data of this name; give shards, or use one of {known}"
        )
    folder = Path(place(data, root))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.with_name(f".{folder.name}.lock")):
        if is_complete(data, root):
            return
        raw = _raw(data, root)
        tiles = _synthetic_tiles(data, raw)
        # In random order, as the names of the tiles may begin with their class. The splits of the raw data have fixed
        # shares, which a study of many test tiles could not use.
        keys, start = shuffle_keys(tiles.keys(), data.seed), 0
        # Not in the order of the file: it is not part of the identity, so it must not decide which tiles a split has.
        for split, count in sorted(data.tiles.items(), key=lambda item: _order(item[0])):
            part = _Subset(tiles, keys[start : start + count])
            start += count
            write_shards(
                part, str(folder), split, workers=workers, shard_mb=_SHARD_MB, seed=data.seed, synthetic=True
            )
        Manifest.load(str(folder))
        write_atomically(folder / _DONE, json.dumps(identity(data), indent=1) + "\n")
        remove_leftovers(data, root)


def remove_leftovers(data: Data, root: Path) -> None:
    """Remove the raw tiles of complete shards, which a kill may leave."""
    if data.shards is None and is_complete(data, root):
        shutil.rmtree(_raw(data, root), ignore_errors=True)


def _raw(data: Data, root: Path) -> Path:
    folder = Path(place(data, root))
    return folder.with_name(f"{folder.name}.raw")


def _synthetic_tiles(data: Data, raw: Path) -> RawDataset:
    """All tiles: windows of scenes, or whole ones, which are written to ``raw``."""
    count = sum(data.tiles.values())
    if data.window_m is not None:
        return datasets.synthetic_windows(data.dataset, count, data.seed, data.window_m)
    datasets.synth(data.dataset, raw, count, data.seed)
    return _AllTiles(data.dataset, raw)


def _order(split: str) -> tuple[int, str]:
    return (_SPLITS.index(split) if split in _SPLITS else len(_SPLITS), split)


class _AllTiles:
    """The tiles of all splits of a raw dataset."""

    def __init__(self, dataset: str, src: Path) -> None:
        self._splits = [datasets.open_raw(dataset, src, split) for split in _SPLITS]
        self.spec = self._splits[0].spec
        self._split_of = {key: split for split in self._splits for key in split.keys()}  # noqa: SIM118 - no mapping

    def keys(self) -> list[str]:
        return list(self._split_of)

    def read(self, key: str) -> Tile:
        return self._split_of[key].read(key)

    def absent(self, key: str) -> tuple[str, ...]:
        return absent_from(self._split_of[key], key)


class _Subset:
    """Some tiles of a raw dataset."""

    def __init__(self, dataset: RawDataset, keys: list[str]) -> None:
        self.spec, self._dataset, self._keys = dataset.spec, dataset, keys

    def keys(self) -> list[str]:
        return self._keys

    def read(self, key: str) -> Tile:
        return self._dataset.read(key)

    def absent(self, key: str) -> tuple[str, ...]:
        return absent_from(self._dataset, key)


def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
