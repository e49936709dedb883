"""Manifests in the form of :class:`ShardTable`, parsed once per node and mapped by every process.

``<cache>/manifests/<SHA-256 of manifest.json>.v1`` is a safetensors file: the columns of the shards, the rest of the
manifest as JSON, and a hash of both. The manifest itself is read, and compared with its checksum file, at every start:
only parsing is saved. A file is complete or absent, whenever a process is killed, and written again if it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale import untrusted
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.checksum import sha256_hex
from maestro_scale.shards.format.manifest import Manifest, check_spec, read_manifest
from maestro_scale.shards.format.serialization import from_builtins, to_builtins
from maestro_scale.shards.format.shard_table import ShardTable

_SUFFIX = ".v1"  # to be counted up with every change of the format, and of the rules for manifests
_UNUSED_S = 30 * 86400.0  # until a file that no process has mapped is removed

log = logging.getLogger(__name__)


def load_manifest(url: str, cache_dir: Path) -> Manifest:
    """As ``Manifest.load``, parsed only if no process of the node has parsed the same manifest before."""
    data, where = read_manifest(url)
    digest = sha256_hex(data)
    if (manifest := mapped_manifest(cache_dir, digest)) is not None:
        return manifest
    manifest = Manifest.loads(data, where)
    try:
        _write(_path(cache_dir, digest), manifest)
    except OSError as error:  # a full disk: the cache is of use, but nothing depends on it
        log.warning("%s: the parsed manifest cannot be kept (%s)", cache_dir, error.strerror or error)
        return manifest
    # Mapped instead of as it was parsed: its memory is shared with the other processes.
    return mapped_manifest(cache_dir, digest) or manifest


def mapped_manifest(cache_dir: Path, digest: str) -> Manifest | None:
    """The manifest with this SHA-256, if it was parsed on this node and its file is intact."""
    path = _path(cache_dir, digest)
    try:
        content = untrusted.load_tensors(path)
        head = content["head"].numpy().tobytes()
        parts = {name: content[name].numpy() for name in ("rows", "text")}
        if content["sha256"].numpy().tobytes() != _hash(head, parts):
            raise ManifestError(f"{path}: has changed since it was written")
        with suppress(OSError):  # a cache that others own
            os.utime(path)
        return _of_head(untrusted.load_json(head, limits=untrusted.MANIFEST), path)
    except FileNotFoundError:
        return None
    except (untrusted.InputError, ManifestError, KeyError, OSError) as error:
        log.warning("%s is damaged and written again (%s)", path, error)
        return None


def _of_head(head: dict[str, Any], path: Path) -> Manifest:
    digest, splits = head.pop("digest"), tuple(head.pop("splits"))
    absents = tuple(tuple(names) for names in head.pop("absents"))
    manifest = from_builtins(Manifest, {**head, "shards": []})
    check_spec(manifest.spec)
    return manifest.with_shards(ShardTable.map(path, splits, absents), digest)


def _write(path: Path, manifest: Manifest) -> None:
    from safetensors.numpy import save_file  # writing needs no parser

    table = ShardTable.of(manifest.shards)
    rest = {f.name: to_builtins(getattr(manifest, f.name)) for f in fields(manifest) if f.name != "shards"}
    head = {**rest, "digest": manifest.digest, "splits": table.splits, "absents": table.absents}
    text = json.dumps(head).encode()
    arrays = table.tensors()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unused(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}")
    try:
        content = {
            "head": np.frombuffer(text, np.uint8),
            "sha256": np.frombuffer(_hash(text, arrays), np.uint8),
        }
        save_file({name: np.ascontiguousarray(a) for name, a in (arrays | content).items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _hash(head: bytes, arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256(head)
    for name in ("rows", "text"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.digest()


def _remove_unused(folder: Path) -> None:
    """Remove what no process has mapped for long; those that have mapped it keep it."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _UNUSED_S:
                path.unlink()


def _path(cache_dir: Path, digest: str) -> Path:
    return Path(cache_dir).expanduser() / "manifests" / f"{digest}{_SUFFIX}"
