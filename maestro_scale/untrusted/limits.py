"""Limits for documents from outside, and the error that a document beyond them raises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from maestro_scale.errors import MaestroError

KIB, MIB = 1024, 1024 * 1024


class InputError(MaestroError, ValueError):
    """A document from outside is malformed or exceeds a limit. One line.

    Also a ValueError, which the standard parsers raise, so that ``except ValueError`` covers both.
    """


@dataclass(frozen=True)
class Limits:
    """Limits of one document. ``entries``: keys and list items; ``text``: characters of one string."""

    bytes: int
    entries: int
    depth: int = 64
    text: int = 64 * KIB


# The worst document within these limits (all characters outside ASCII, all containers empty) stays below 1 GiB.
MANIFEST = Limits(bytes=96 * MIB, entries=4_000_000)
"""Manifests and indexes of shards: 300,000 shards take 60 MB."""
DOCUMENT = Limits(bytes=64 * MIB, entries=2_000_000, text=MIB)
"""All other JSON: results, COMMIT.json, config.json, run files, raw datasets. Recipes are kept in it as text."""
HEADER = Limits(bytes=16 * MIB, entries=200_000, text=MIB)
"""Headers of safetensors files and samples."""
RECIPE = Limits(bytes=MIB, entries=20_000)
"""YAML. PyYAML needs about 50 us for an entry."""

NUMBER_CHARACTERS = 40  # of an integer; 128 bits need 39
YAML_INTEGER_CHARACTERS = 20  # so that no integer keys have equal hashes, as those that differ by 2^61 - 1
FLOAT_CHARACTERS = (
    400  # of a float; the shortest exact text of a double has at most 24, other tools write more
)
TAR_MEMBERS = 250_000
PAX_RECORDS = 4 * TAR_MEMBERS  # in all extended headers of a tar
TAR_NAME_BYTES = 4096  # of a member's name, also of a PAX record
FRAME_BYTES = 64 * MIB  # decompressed size of one zstd frame
ARCHIVE_BYTES = 64 * MIB  # decompressed size of one array of an .npz file
COUNTS_BYTES = 128 * MIB  # decompressed size of the counts per tile of a result
ARCHIVE_MEMBERS = 10_000  # of an .npz file
ZIP_DIRECTORY_BYTES = 64 * MIB
FIELD_BYTES = 512 * MIB  # decompressed size of one field of a sample
TENSOR_AXES = 16


def at(where: str, what: str) -> str:
    return f"{where}: {what}" if where else what


def size_text(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB"


def is_relative_path(text: str) -> bool:
    """Whether a path from a document stays below the folder that it is joined to."""
    path = PurePosixPath(text)
    # str(path) == text: no empty parts, no "." and no trailing slash, so that a path has one spelling
    return (
        bool(text)
        and not path.is_absolute()
        and ".." not in path.parts
        and str(path) == text
        and "\0" not in text
    )
