"""Destination of a split: existing content, finished shards that can be kept, and what publication leaves behind.

Order of a write: lock, read what exists, write shards (each: index, then tar), publish the manifest, remove leftovers.
The manifest is published last because readers trust it alone: until then they see the dataset without the new split,
and a write that is killed at any point can be continued. A published shard is never overwritten, so running jobs are
not disturbed.

In an object store a writer that was stopped for long may continue after another has taken over its split. It can do no
harm: names depend on the content, so it cannot overwrite the shards of the other; leftovers are removed only after
one's own publication; and the manifest is written on condition that it is the one that was read and merged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.errors import shorten
from maestro_scale.shards.errors import ManifestError, WriteError
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import (
    FORMAT_VERSION,
    Manifest,
    check_spec,
    check_split_name,
)
from maestro_scale.shards.format.serialization import to_builtins
from maestro_scale.shards.local_storage import LocalStorage
from maestro_scale.shards.storage import RemoteStorage, local_folder, open_storage
from maestro_scale.shards.temporary import temporary_folder
from maestro_scale.shards.write.exclusion import LostSplit, WriterLock
from maestro_scale.shards.write.merge import SplitDiffers, split_manifest
from maestro_scale.shards.write.packing import HASH_DIGITS, PlannedShard, WritePlan, WrittenShard
from maestro_scale.shards.write.part import WHOLE_SPLIT, WriterPart
from maestro_scale.shards.write.publication import PublishedManifest

_FILE = re.compile(
    rf"(?P<split>[A-Za-z0-9_-]+)-(?P<number>\d{{6}})(-[0-9a-f]{{{HASH_DIGITS}}})?\.(tar|index\.json)"
)


class Destination:
    """Context manager to write one split, or a part of it, to ``dst``.

    Entering raises WriteError if another process writes the split or ``dst`` contains something else.
    """

    def __init__(
        self,
        dst: str,
        spec: DatasetSpec,
        split: str,
        codec: str,
        seed: int,
        part: WriterPart = WHOLE_SPLIT,
        synthetic: bool | None = None,
    ) -> None:
        try:
            check_split_name(split)
            check_spec(spec)
        except ManifestError as error:
            raise WriteError(str(error)) from error
        if codec not in CODECS:
            raise WriteError(f"there is no codec {codec!r}; use one of: {', '.join(CODECS)}")
        self.url = str(dst)
        self.storage = open_storage(dst)
        self.split = split
        self._spec, self._codec, self._seed, self._part = spec.stored(), codec, seed, part
        self._synthetic = synthetic
        self._manifest = PublishedManifest(self.storage, split, self._spec, codec, seed)
        self._stack = ExitStack()

    def __enter__(self) -> Destination:
        with ExitStack() as stack:
            self.staging = stack.enter_context(staging_folder(self.url))
            self._lock = stack.enter_context(WriterLock(self.storage, self.split, self._part))
            if isinstance(self.storage, LocalStorage):
                self._remove_temporary_files(self.storage.folder)
            # The names first: a split that is published in between is then in the manifest, but not in the list.
            names = set(self.storage.list_names())
            self._existing = self._manifest.read_verified()
            self._check_existing_files(names)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def make_plan(
        self, order: Sequence[str], shards: Sequence[PlannedShard], settings: str = ""
    ) -> WritePlan:
        """The plan that writes the samples ``order`` as ``shards``. ``settings``: see :class:`.spec.RawDataset`."""
        content = [
            FORMAT_VERSION,
            to_builtins(self._spec),
            self.split,
            self._codec,
            self._seed,
            order,
            [(shard.start, shard.stop) for shard in shards],
        ]
        if any(shard.absent for shard in shards):  # else the digest is that of earlier revisions
            content.append([shard.absent for shard in shards])
        if settings:
            content.append(settings)
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._lock.declare(digest)
        return WritePlan(self._spec, self.split, tuple(shards), digest)

    def finished_shards(self, plan: WritePlan, strict: bool = False) -> dict[int, WrittenShard]:
        """The finished shards of ``plan``, by number; if ``strict``, only those from which no tile was left out.

        In a folder, whose names do not depend on the content, it removes unpublished shards of other plans among those
        that this writer writes. WriteError if the split is already published with other content, if a shard was
        finished twice with different content, or if ``strict`` and a shard that this writer may not write again lacks
        tiles.
        """
        published = self._published(self._existing)
        finished: dict[int, list[WrittenShard]] = {}
        for name, number in sorted(self._shard_names().items()):
            index = self._index(name)
            if index is None or index.plan != plan.digest or number >= plan.num_shards:
                if name in published:
                    self._refuse_other_content()
                if isinstance(self.storage, LocalStorage) and self._part.includes(number):
                    self._remove_shard(name)
            elif strict and index.left_out:
                # Of an earlier call that was not strict: the tile may be readable now, else its error is raised.
                if published or not self._part.includes(number):
                    self._refuse_left_out(name, index)
            elif not index.keys or self.storage.size(name) == index.bytes:
                finished.setdefault(number, []).append(WrittenShard(name, index))
        if published and not finished:
            self._refuse_other_content()
        return {number: self._only(shards, published) for number, shards in finished.items()}

    def _only(self, shards: Sequence[WrittenShard], published: Set[str]) -> WrittenShard:
        chosen = [s for s in shards if s.name in published] or shards
        if len({s.index.sha256 for s in chosen}) > 1:
            names = " and ".join(sorted(s.name for s in chosen))
            raise WriteError(
                f"{self.storage.address()}: {names} are the same shard with different content: the raw data has "
                "changed since one of them was written; remove both, or choose another folder"
            )
        return chosen[0]

    def refuse_other_plans(self, plan: WritePlan) -> None:
        """WriteError if other parts have written shards of another plan, and none of them is running any more.

        Such a split never becomes complete: the list of raw tiles, or an argument, differed between the jobs.
        """
        if self._lock.other_writers():
            return
        others = []
        for name, number in sorted(self._shard_names().items()):
            index = None if self._part.includes(number) else self._index(name)
            if index is not None and index.plan != plan.digest:
                others.append(name)
        if others:
            raise WriteError(
                f"{self.storage.address()}: part {self._part} is written, but {len(others)} shards of other parts "
                f"(first {others[0]}) are of another list of tiles or other arguments, so split {self.split!r} is not "
                "complete: run the other parts again, on the raw data as it is now; this part is kept"
            )

    def publish(self, plan: WritePlan, shards: dict[int, WrittenShard]) -> Manifest:
        """Add the finished split to the manifest, atomically; readers see the old one until then.

        Then remove leftovers of the split: shards of other plans, unless they may belong to another writer.
        """
        filled = {i: shards[i] for i in range(plan.num_shards) if shards[i].index.keys}
        if not filled:
            # Else the next call would keep them, although files may have been added since.
            for shard in shards.values():
                self._remove_shard(shard.name)
            raise _nothing_left(self.split, [shard.index for shard in shards.values()])
        every = [shards[i].index for i in sorted(shards)]
        added = split_manifest(plan, self._codec, self._seed, filled.values(), every, self._synthetic)
        try:
            with self._lock.publication():
                self._lock.check()
                manifest = self._manifest.add(added, self._lock)
        except (SplitDiffers, LostSplit):
            self._discard(filled.values())
            raise
        if not self._lock.other_writers():
            self._remove_leftovers(plan, manifest)
        return manifest

    def _check_existing_files(self, names: set[str]) -> None:
        """Refuse a folder with unknown files: they could be overwritten or be mistaken for shards."""
        if self._existing is None:
            strange = [n for n in names if not n.startswith(".") and not n.endswith((".tar", ".index.json"))]
            if strange:
                raise WriteError(
                    f"{self.storage.address()}: is not empty and contains no dataset in shards (it has "
                    f"{min(strange)}); choose an empty folder"
                )
        known = {shard.path for shard in self._existing.shards} if self._existing else set()
        for name in sorted(n for n in names if n.endswith(".tar") and n not in known):
            index = self._index(name)
            if index is None and self.storage.size(name) is None:
                continue  # another writer has removed it
            if index is None or index.dataset != self._spec.name:
                raise WriteError(
                    f"{self.storage.address(name)}: is not a shard that maestro-scale wrote for {self._spec.name}; "
                    "move it, or choose another folder"
                )

    def _refuse_other_content(self) -> NoReturn:
        raise WriteError(
            f"{self.storage.address()}: already contains split {self.split!r}, with other tiles or settings; "
            "choose another folder, or delete it"
        )

    def _refuse_left_out(self, name: str, index: ShardIndex) -> NoReturn:
        key, cause = min(index.left_out.items())
        raise WriteError(
            f"{self.storage.address(name)}: was written without {len(index.left_out)} tiles that could not be read "
            f"(first: {shorten(key)}: {cause}); write the split into another folder, or omit --strict"
        )

    def _published(self, manifest: Manifest | None) -> set[str]:
        """Names of the split's shards in a manifest."""
        return {s.path for s in manifest.shards if s.split == self.split} if manifest else set()

    def _shard_names(self) -> dict[str, int]:
        """Tar name → number of every shard of the split of which a tar or an index exists."""
        matches = filter(None, map(_FILE.fullmatch, self.storage.list_names()))
        return {
            f"{m.string.removesuffix('.tar').removesuffix('.index.json')}.tar": int(m["number"])
            for m in matches
            if m["split"] == self.split
        }

    def _remove_leftovers(self, plan: WritePlan, manifest: Manifest) -> None:
        """Remove shards of this split that are not in the manifest; the index of an empty shard of ``plan`` stays."""
        published = self._published(manifest)
        for name in sorted(self._shard_names().keys() - published):
            index = self._index(name)
            if index is not None and index.plan == plan.digest and not index.keys:
                self.storage.remove(name)  # an empty tar, which earlier revisions wrote
            else:
                self._remove_shard(name)

    def _discard(self, written: Iterable[WrittenShard]) -> None:
        """Remove what this writer wrote, if the split was published by another in the meantime.

        Only in object stores: in a folder, the names of the other writer's shards are the same. If the split is not
        published, the other writer may use these shards.
        """
        published = self._published(self._manifest.read()[0])
        if published and isinstance(self.storage, RemoteStorage):
            for shard in written:
                if shard.name not in published:
                    self._remove_shard(shard.name)

    def _remove_shard(self, name: str) -> None:
        # In this order: a tar without an index would be refused as a foreign file.
        self.storage.remove(name)
        self.storage.remove(index_path(name))

    def _remove_temporary_files(self, folder: Path) -> None:
        """Remove what a killed writer of this split, or of this part of it, left."""
        try:
            for leftover in folder.glob(f".{self.split}-*.tmp"):
                found = _FILE.match(leftover.name[1:])
                if found and self._part.includes(int(found["number"])):
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"{folder}: cannot be written ({error.strerror})") from error

    def _index(self, shard_name: str) -> ShardIndex | None:
        name = index_path(shard_name)
        try:
            return ShardIndex.read(self.storage, name)
        except (FileNotFoundError, ManifestError):
            return None


def _nothing_left(split: str, indices: Iterable[ShardIndex]) -> WriteError:
    """A line for each kind of tiles that are left out, with the first example."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for index in indices:
        counts.update(index.notes)
        examples = {**index.examples, **examples}
    lines = (f"  {num} tiles: {note} (first: {examples[note]})" for note, num in counts.most_common())
    return WriteError("\n".join((f"split {split}: every tile is left out, nothing is written", *lines)))


@contextmanager
def staging_folder(dst: str) -> Iterator[Path]:
    """Folder for temporary files.

    A local ``dst`` itself, so that publishing is a rename within one file system; for an object store a temporary
    folder, from which files are uploaded.
    """
    folder = local_folder(dst)
    if folder is None:
        with temporary_folder() as temporary:
            yield temporary
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder}: the folder cannot be created ({error.strerror})") from error
    yield folder
