"""Restricted loading of pickled checkpoints from others, without executing their code.

The pickle of a ``torch.save`` file is interpreted by :mod:`.pickled`, which calls nothing that the file names. Tensors
are created here, within the bytes that the file has. Other objects that training frameworks store in checkpoints, such
as configuration objects, become an :class:`InertRecord` if they come from known packages; a file that names anything
else is refused.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.interop.export import ExportError
from maestro_scale.interop.pickled import InertRecord, Interpreter, Name

# Packages whose objects become records. None of them is imported.
INERT_PACKAGES = frozenset(
    {
        "argparse",
        "conf",
        "hydra_zen",
        "lightning",
        "lightning_fabric",
        "lightning_utilities",
        "maestro",
        "numpy",
        "omegaconf",
        "pathlib",
        "pytorch_lightning",
        "ssl_models",
        "torchmetrics",
    }
)
MAX_PICKLE = untrusted.Limits(bytes=64 * 1024 * 1024, entries=0)
MAX_RECORDS = 200_000  # files in the archive: one per tensor
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER_BYTES = 30


class _Record(NamedTuple):
    """A file of the archive: its bytes in the checkpoint."""

    offset: int
    size: int


class _Storage(NamedTuple):
    record: _Record
    dtype: torch.dtype


def load_untrusted(path: Path) -> Any:
    """Load a ``torch.save`` file on the CPU, with memory-mapped tensors.

    Raises:
        ExportError: the file is missing, damaged or not a torch checkpoint, or it names code outside
            ``INERT_PACKAGES``.
    """
    if not path.is_file():
        raise ExportError(f"{path}: does not exist")
    try:
        checkpoint = _Checkpoint(path)
        content = Interpreter(checkpoint.pickle, checkpoint.call, checkpoint.storage).load()
    except (untrusted.InputError, OSError) as error:
        raise ExportError(f"{path}: cannot be read as a checkpoint ({error})") from None
    if checkpoint.refused:
        names = ", ".join(shorten(n) if len(n) > 60 else n for n in sorted(checkpoint.refused)[:3])
        raise ExportError(
            f"{path}: would run {names} when it is loaded, which a checkpoint does not need; "
            "nothing was run. Do not use this file, or ask its author to save the state dict alone"
        )
    return content


class _Checkpoint:
    """The archive of a checkpoint, and the values that its pickle may have."""

    def __init__(self, path: Path) -> None:
        self.refused: set[str] = set()
        """Names that would be called and are not known."""
        self._records, self.pickle = _read_archive(path)
        # Tensors may share bytes, as tied weights do; but each is copied when it is converted.
        stored = sum(record.size for name, record in self._records.items() if name.startswith("data/"))
        self._elements_left = 4 * stored
        self._mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def call(self, path: str, args: tuple[Any, ...]) -> Any:
        """The value of a call that the pickle describes."""
        if path in ("collections.OrderedDict", "collections.Counter") and not args:
            return {}
        if path == "torch._utils._rebuild_tensor_v2":
            return self._tensor(*self._tensor_args(args))
        if path in ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"):
            return untrusted.field_of([*args], Tensor, 0)
        if path == "torch.Size":
            return args[0] if args else ()
        if path == "_codecs.encode":  # how protocol 2 stores bytes
            text = untrusted.field_of([*args], str, 0)
            return text.encode("latin1", errors="replace")
        if path == "builtins.set":
            return list(args[0]) if args and isinstance(args[0], list) else []
        if path == "torch.device":
            return Name("torch.device")
        if path.partition(".")[0] not in INERT_PACKAGES:
            self.refused.add(path)
        return InertRecord(path, args)

    def storage(self, key: Any) -> _Storage:
        """The storage of the persistent id ("storage", class, name of its file, device, number of elements)."""
        if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage" or not isinstance(key[1], Name):
            raise untrusted.InputError("a reference that is not to a storage")
        dtype = _STORAGES.get(key[1].path.removeprefix("torch."))
        if dtype is None:
            raise untrusted.InputError(f"a storage of the type {shorten(key[1].path)}")
        record = self._records.get(f"data/{key[2]}") if isinstance(key[2], str) else None
        if record is None:
            raise untrusted.InputError("a storage that the file does not contain")
        return _Storage(record, dtype)

    def _tensor_args(self, args: tuple[Any, ...]) -> tuple[_Storage, int, tuple[int, ...], tuple[int, ...]]:
        storage, offset, shape, strides = args[:4] if len(args) >= 4 else (None,) * 4
        valid = (
            isinstance(storage, _Storage)
            and type(offset) is int
            and isinstance(shape, tuple)
            and isinstance(strides, tuple)
            and len(shape) == len(strides) <= untrusted.TENSOR_AXES
            and all(type(n) is int and 0 <= n < 2**48 for n in (offset, *shape, *strides))
        )
        if not valid:
            raise untrusted.InputError("a tensor without storage, shape and strides")
        assert isinstance(storage, _Storage)  # for mypy: checked above
        assert isinstance(offset, int)
        assert isinstance(shape, tuple)
        assert isinstance(strides, tuple)
        return storage, offset, shape, strides

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Tensor:
        count = math.prod(shape)
        available = storage.record.size // storage.dtype.itemsize
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        # An expanded tensor (stride 0) has more elements than its storage, and would need their memory when copied.
        if count and (last >= available or count > available):
            raise untrusted.InputError(f"a tensor of shape {shape} past the end of its storage")
        self._elements_left -= count
        if self._elements_left < 0:
            raise untrusted.InputError("tensors with more elements than the file has")
        first, size = storage.record
        values = self._mapped[first : first + size - size % storage.dtype.itemsize]
        try:
            if not count:
                return torch.empty(shape, dtype=storage.dtype)
            return torch.empty(0, dtype=storage.dtype).set_(values, offset, shape, strides)
        except RuntimeError:  # the product of some axes exceeds 64 bits
            raise untrusted.InputError(f"a tensor of shape {shape}, which torch does not have") from None


def _read_archive(path: Path) -> tuple[dict[str, _Record], bytes]:
    """The files below the archive's folder by name, and the bytes of data.pkl. InputError; OSError."""
    try:
        with path.open("rb") as file:
            infos = untrusted.open_zip(file, MAX_RECORDS).infolist()
            records = {info.filename.partition("/")[2]: _record(info, file) for info in infos}
            if "data.pkl" not in records or "constants.pkl" in records:
                raise untrusted.InputError("is a zip archive, but not a checkpoint of torch.save")
            order = _content(file, records["byteorder"]) if "byteorder" in records else b"little"
            if order != b"little":
                raise untrusted.InputError("was written on a big-endian machine")
            return records, _content(file, records["data.pkl"])
    # ZipFile also raises NotImplementedError for versions and struct.error for damaged extra fields.
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OverflowError) as error:
        if isinstance(error, untrusted.InputError):
            raise
        raise untrusted.InputError(
            f"it is not a checkpoint of torch 1.6 or later, or is cut short: {' '.join(str(error).split())}; "
            "download it again"
        ) from None


def _record(info: zipfile.ZipInfo, file: Any) -> _Record:
    """Where the bytes of a file of the archive are. InputError if they are compressed or past the end."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise untrusted.InputError(f"{shorten(info.filename)} is compressed or encrypted")
    file.seek(max(info.header_offset, 0))
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise untrusted.InputError(f"{shorten(info.filename)} has no header")
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    offset = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if offset + info.file_size > file.seek(0, 2):
        raise untrusted.InputError(f"{shorten(info.filename)} is cut short")
    return _Record(offset, info.file_size)


def _content(file: Any, record: _Record) -> bytes:
    untrusted.check_size(record.size, "its pickle", MAX_PICKLE)
    file.seek(record.offset)
    return file.read(record.size)
