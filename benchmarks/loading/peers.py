"""Other projects' formats and loaders, each in the forms that a user would choose: writing, and reading into batches.

Runs in the environment of the other loaders, without maestro_scale. A sample is stored as its arrays, or as one
safetensors buffer whose arrays are views of it. Every loader reads in the order of storage, without worker processes.
"""

from __future__ import annotations

import importlib.metadata
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.loading.prepare import Fields, Preparation, views

_CHUNK_BYTES = 64_000_000

Batches = Iterator[Any]
Samples = list[Path]
"""A safetensors file for each sample."""


@dataclass(frozen=True)
class Peer:
    """One form of a peer. ``does``: what it stores and how it reads, for the page."""

    package: str
    does: str
    write: Callable[[Samples, Path], None]
    read: Callable[[Path, Preparation], Batches]

    @property
    def version(self) -> str:
        """Installed version."""
        return importlib.metadata.version(self.package)


def _write_npy_tars(samples: Samples, out: Path) -> None:
    _pack(samples, out, _arrays)


def _write_tars(samples: Samples, out: Path) -> None:
    _pack(samples, out, lambda path: {"safetensors": path.read_bytes()})


def _arrays(path: Path) -> dict[str, bytes]:
    """{suffix: .npy} of a sample. webdataset takes everything before the first dot as the key."""
    members = {}
    for name, array in views(path.read_bytes()).items():
        file = io.BytesIO()
        np.save(file, array)
        members[f"{name.replace('.', '+')}.npy"] = file.getvalue()
    return members


def _pack(samples: Samples, out: Path, members: Callable[[Path], dict[str, bytes]]) -> None:
    """Write the members of each sample, {suffix: content}, into tars of about ``_CHUNK_BYTES``."""
    out.mkdir()
    writer: tarfile.TarFile | None = None
    size = 0
    for number, path in enumerate(samples):
        if writer is None or size >= _CHUNK_BYTES:
            if writer is not None:
                writer.close()
            writer, size = tarfile.open(out / f"{number:06d}.tar", "w"), 0  # noqa: SIM115
        for suffix, content in members(path).items():
            member = tarfile.TarInfo(f"{number:06d}.{suffix}")
            member.size = len(content)
            size += member.size
            writer.addfile(member, io.BytesIO(content))
    if writer is not None:
        writer.close()


def _webdataset(urls: list[str], arrays: Callable[[dict[str, Any]], Fields], decode: bool) -> Any:
    import webdataset as wds

    data = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
    return (data.decode() if decode else data).map(arrays)


def _npy_fields(member: dict[str, Any]) -> Fields:
    return {k.removesuffix(".npy").replace("+", "."): v for k, v in member.items() if k.endswith(".npy")}


def _safetensors_fields(member: dict[str, Any]) -> Fields:
    return views(member["safetensors"])


def _read_npy_tars(folder: Path, prepare: Preparation) -> Batches:
    data = _webdataset(_tars(folder), _npy_fields, decode=True)
    return _data_loader(data.batched(prepare.layout.batch, collation_fn=prepare, partial=False))


def _read_tars(folder: Path, prepare: Preparation) -> Batches:
    data = _webdataset(_tars(folder), _safetensors_fields, decode=False)
    return _data_loader(data.batched(prepare.layout.batch, collation_fn=prepare, partial=False))


def _tars(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def _data_loader(batches: Any) -> Batches:
    import torch

    return iter(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=0))


def _streaming() -> ModuleType:
    """mosaicml-streaming, whose import of torchvision fails beside a CPU build of torch: torchvision's wheel on PyPI is
    compiled for CUDA and does not load its operators. None of them is used here, so declaring them is enough."""
    import torch

    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
    import streaming

    return streaming


def _write_mds(samples: Samples, out: Path, whole: bool) -> None:
    fields = views(samples[0].read_bytes())
    columns = {"sample": "bytes"} if whole else dict.fromkeys(fields, "ndarray")
    with _streaming().MDSWriter(out=str(out), columns=columns, size_limit=_CHUNK_BYTES) as writer:
        for path in samples:
            data = path.read_bytes()
            writer.write({"sample": data} if whole else views(data))


def _read_mds(folder: Path, prepare: Preparation) -> Batches:
    streaming = _streaming()
    data = streaming.StreamingDataset(local=str(folder), batch_size=prepare.layout.batch, shuffle=False)
    return iter(
        streaming.StreamingDataLoader(
            data, batch_size=prepare.layout.batch, collate_fn=_Collate(prepare), num_workers=0, drop_last=True
        )
    )


class _Collate:
    """Prepares a list of samples, as arrays or as one buffer."""

    def __init__(self, prepare: Preparation) -> None:
        self._prepare = prepare

    def __call__(self, samples: list[Any]) -> dict[str, np.ndarray]:
        return self._prepare([s if "sample" not in s else views(s["sample"]) for s in samples])


def _whole_sample(path: str) -> dict[str, bytes]:
    return {"sample": Path(path).read_bytes()}


def _arrays_of_sample(path: str) -> Fields:
    return {name: np.array(a) for name, a in views(Path(path).read_bytes()).items()}


def _write_litdata(samples: Samples, out: Path, whole: bool) -> None:
    import litdata

    litdata.optimize(
        fn=_whole_sample if whole else _arrays_of_sample,
        inputs=[str(path) for path in samples],
        output_dir=str(out),
        chunk_bytes=_CHUNK_BYTES,
        num_workers=1,
        verbose=False,
    )


def _read_litdata(folder: Path, prepare: Preparation) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder), shuffle=False)
    return iter(
        StreamingDataLoader(
            data, batch_size=prepare.layout.batch, collate_fn=_Collate(prepare), num_workers=0, drop_last=True
        )
    )


def _write_lance(samples: Samples, out: Path) -> None:
    import lance
    import pyarrow as pa

    schema = pa.schema([("sample", pa.large_binary())])
    tables = (
        pa.record_batch([pa.array([p.read_bytes()], pa.large_binary())], schema=schema) for p in samples
    )
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, tables), str(out))


def _scan_lance(folder: Path, prepare: Preparation) -> Batches:
    import lance

    for batch in lance.dataset(str(folder)).to_batches(batch_size=prepare.layout.batch):
        if len(batch) == prepare.layout.batch:
            yield prepare(_lance_fields(batch.column(0)))


def _take_lance(folder: Path, prepare: Preparation) -> Batches:
    import lance

    data, size = lance.dataset(str(folder)), prepare.layout.batch
    order = np.random.default_rng(0).permutation(data.count_rows())
    for first in range(0, len(order) - size + 1, size):
        column = data.take(sorted(order[first : first + size].tolist())).column(0).combine_chunks()
        yield prepare(_lance_fields(column))


def _lance_fields(column: Any) -> list[Fields]:
    return [views(memoryview(value.as_buffer())) for value in column]


PEERS = {
    "webdataset, arrays": Peer(
        "webdataset",
        "tars with one .npy member per array, decoded by webdataset",
        _write_npy_tars,
        _read_npy_tars,
    ),
    "webdataset, buffers": Peer(
        "webdataset", "tars with one safetensors member per sample", _write_tars, _read_tars
    ),
    "mosaicml-streaming, arrays": Peer(
        "mosaicml-streaming",
        "MDS, one ndarray column per array",
        lambda s, o: _write_mds(s, o, False),
        _read_mds,
    ),
    "mosaicml-streaming, buffers": Peer(
        "mosaicml-streaming",
        "MDS, one column of safetensors buffers",
        lambda s, o: _write_mds(s, o, True),
        _read_mds,
    ),
    "litdata, arrays": Peer(
        "litdata", "chunks of dicts of numpy arrays", lambda s, o: _write_litdata(s, o, False), _read_litdata
    ),
    "litdata, buffers": Peer(
        "litdata", "chunks of safetensors buffers", lambda s, o: _write_litdata(s, o, True), _read_litdata
    ),
    "lance, scan": Peer(
        "pylance", "one column of safetensors buffers, scanned in order", _write_lance, _scan_lance
    ),
    "lance, take": Peer("pylance", "the same column, rows taken in random order", _write_lance, _take_lance),
}
