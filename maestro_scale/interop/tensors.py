"""Writing of safetensors files, with failures of the disk raised as OSError, and their SHA-256.

safetensors reports them as SafetensorError, which callers would not recognise as a full disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in lower-case hexadecimal. OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
