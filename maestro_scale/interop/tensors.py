"""Writing of safetensors files, with failures of the disk raised as OSError, and SHA-256 of files.

safetensors reports them as SafetensorError, which callers would not recognise as a full disk.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_BLOCK_BYTES = 4 * 1024 * 1024


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write ``path``. OSError, with errno and path, if it cannot be written."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        number = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def write_tensors_atomically(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As ``write_tensors``, through a temporary file: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    write_tensors(tensors, temporary)
    os.replace(temporary, path)


def write_tensors_hashed(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Write CPU tensors of one dtype as ``write_tensors`` does, flushed to the disk, and hash them meanwhile.

    Returns {bytes, sha256}, as ``commit.entry`` does, but the file is not read again: the hash is of what was given to
    the system. safetensors writes no hash, hence the format is written here; it is the same byte for byte.

    Raises:
        OSError: the file cannot be written.
        ValueError: the tensors have several dtypes, whose order in the file would differ.
    """
    blocks = list(_safetensors_blocks(tensors))
    digest = hashlib.sha256()

    def hash_blocks() -> None:
        for block in blocks:
            digest.update(block)

    # Both release the interpreter: the hash costs no time where the disk is slower than it.
    with ThreadPoolExecutor(1) as pool, path.open("wb", buffering=_BLOCK_BYTES) as file:
        hashed = pool.submit(hash_blocks)
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        hashed.result()
    return {"bytes": sum(map(len, blocks)), "sha256": digest.hexdigest()}


def write_bytes_hashed(data: bytes, path: Path) -> dict[str, Any]:
    """Write a file, flushed to the disk; returns {bytes, sha256}. OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _safetensors_blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file: https://huggingface.co/docs/safetensors/index#format."""
    if len({t.dtype for t in tensors.values()}) > 1:
        raise ValueError(f"tensors of one dtype are expected, not {len(tensors)} of several")
    arrays = {name: tensors[name].contiguous().numpy() for name in sorted(tensors)}
    header, reached = {}, 0
    for name, array in arrays.items():
        end = reached + array.nbytes
        dtype = f"{array.dtype.kind.upper()}{8 * array.itemsize}"  # F32, I64, U8
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        yield array.reshape(-1).data.cast("B")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in lower-case hexadecimal. OSError if it cannot be read."""
    digest = hashlib.sha256()
    # One block is hashed while the next one is read; both release the interpreter.
    buffers = itertools.cycle(bytearray(_BLOCK_BYTES) for _ in range(2))
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        hashed: Future[None] | None = None
        for buffer in buffers:
            size = file.readinto(buffer)
            if hashed is not None:
                hashed.result()
            if not size:
                break
            hashed = pool.submit(digest.update, memoryview(buffer)[:size])
    return digest.hexdigest()
