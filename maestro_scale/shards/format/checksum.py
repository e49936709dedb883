"""``manifest.sha256``: the optional checksum file beside a manifest, in the format of ``sha256sum``.

It shows that ``manifest.json`` is the file that was published: the manifest lists the SHA-256 of every shard, but
nothing else would notice a changed digit in the manifest itself. It protects against accidents, not against somebody
who can write to the folder.

Order of a publication: remove the checksum file, write the manifest, write the checksum file. A reader that finds no
checksum file accepts the manifest, so that a publication that was killed in between leaves a readable dataset. A reader
that finds one of another manifest has probably met a publication, and reads both files again.
"""

from __future__ import annotations

import hashlib
import re
import time

from maestro_scale.shards.errors import ManifestError, StoreError
from maestro_scale.shards.storage import RemoteStorage, Storage
from maestro_scale.untrusted.limits import MANIFEST as MANIFEST_LIMITS

MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
_LINE = re.compile(rb"^([0-9a-f]{64}) [ *](?:\./)?manifest\.json\r?$", re.MULTILINE)
_CHECKSUM_BYTES = 1024 * 1024  # it may list the checksums of all shards too
_WAITS_S = (0.1, 0.3, 0.6, 1.0)  # between readings: a publication needs two small writes


def sha256_hex(data: bytes) -> str:
    """SHA-256 of ``data`` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def checksum_bytes(manifest: bytes) -> bytes:
    """Content of the checksum file for the bytes of a manifest: what ``sha256sum manifest.json`` prints."""
    return f"{sha256_hex(manifest)}  {MANIFEST}\n".encode()


def read_manifest_bytes(storage: Storage) -> bytes:
    """The bytes of ``manifest.json``, compared with the checksum file if there is one.

    Raises:
        FileNotFoundError: there is no manifest.
        StoreError: a file cannot be read.
        ManifestError: the two files do not belong together, also after reading them again for about two seconds.
    """
    data = storage.read(MANIFEST, MANIFEST_LIMITS.bytes)
    for wait_s in (*_WAITS_S, None):
        problem = checksum_problem(storage, data)
        if problem is None:
            return data
        if wait_s is not None:
            time.sleep(wait_s)
            data = storage.read(MANIFEST, MANIFEST_LIMITS.bytes)
    raise ManifestError(problem)


def checksum_problem(storage: Storage, manifest: bytes) -> str | None:
    """Why the checksum file contradicts the bytes of the manifest; None if it agrees or does not exist."""
    try:
        content = storage.read(CHECKSUM, _CHECKSUM_BYTES)
    except FileNotFoundError:
        return None
    except StoreError as error:
        # S3 answers 403 instead of 404 to those who may read objects but not list them.
        if isinstance(storage, RemoteStorage) and isinstance(error.__cause__, PermissionError):
            return None
        raise
    lines = _LINE.findall(content)
    if len(lines) != 1:
        return f"{storage.address(CHECKSUM)}: has no single line of `sha256sum {MANIFEST}`; write it again or remove it"
    stated, found = lines[0].decode(), sha256_hex(manifest)
    if stated == found:
        return None
    return (
        f"{storage.address(MANIFEST)}: has SHA-256 {found[:12]}…, but {CHECKSUM} beside it says {stated[:12]}…: the "
        f"manifest was changed or damaged after it was published; restore it, or remove {CHECKSUM} to accept the change"
    )


def remove_checksum(storage: Storage) -> None:
    """Before the manifest is replaced: a reader must not find the old checksum with the new manifest for long."""
    storage.remove(CHECKSUM)


def write_checksum(storage: Storage) -> None:
    """Write the checksum file of the manifest that ``storage`` holds now. WriteError or StoreError.

    Repeated until the manifest is still the same afterwards: where writers of an object store publish at the same time,
    a slow one would otherwise leave the checksum of a manifest that the other has replaced.
    """
    try:
        data = storage.read(MANIFEST)
        while True:
            storage.write(CHECKSUM, checksum_bytes(data))
            now = storage.read(MANIFEST)
            if now == data:
                return
            data = now
    except FileNotFoundError as error:
        raise StoreError(f"{storage.address(MANIFEST)}: disappeared while it was published") from error
