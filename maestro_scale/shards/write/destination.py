"""Destination of a split: existing content, finished shards that can be kept, and publication in the manifest.

Order of a write: lock, read what exists, write shards (each: index, then tar), publish the manifest. The manifest is
published last because readers trust it alone: until then they see the dataset without the new split, and a write that
is killed at any point can be continued. A published shard is never overwritten, so running jobs are not disturbed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from maestro_scale import __version__
from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.errors import ManifestError, WriteError
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    check_spec,
    check_split_name,
)
from maestro_scale.shards.format.serialization import to_builtins
from maestro_scale.shards.locks import Locked, file_lock, locks_unsupported
from maestro_scale.shards.storage import LocalStorage, local_folder, open_storage
from maestro_scale.shards.write.packing import WritePlan
from maestro_scale.shards.write.part import WHOLE_SPLIT, WriterPart

_FILE = re.compile(r"(?P<split>[A-Za-z0-9_-]+)-(?P<number>\d{6})\.(tar|index\.json)")
_LOCK_CHECKS = 20


class Destination:
    """Context manager to write one split, or a part of it, to ``dst``.

    Entering raises WriteError if another process writes the split or ``dst`` contains something else.
    """

    def __init__(
        self, dst: str, spec: DatasetSpec, split: str, codec: str, seed: int, part: WriterPart = WHOLE_SPLIT
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
        self._spec, self._codec, self._seed, self._part = spec, codec, seed, part
        self._stack = ExitStack()

    def __enter__(self) -> Destination:
        with ExitStack() as stack:
            self.staging = stack.enter_context(staging_folder(self.url))
            if isinstance(self.storage, LocalStorage):
                self._lock(stack, self.storage.folder)
            self._existing = self._read_existing()
            self._check_existing_files()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def make_plan(self, order: Sequence[str], bounds: Sequence[tuple[int, int]]) -> WritePlan:
        """The plan that writes the samples ``order`` as shards with ``bounds``."""
        content = [
            FORMAT_VERSION,
            to_builtins(self._spec),
            self.split,
            self._codec,
            self._seed,
            order,
            bounds,
        ]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return WritePlan(self._spec, self.split, len(bounds), digest)

    def finished_shards(self, plan: WritePlan) -> dict[int, ShardIndex]:
        """Index of each finished shard of ``plan``, by number; removes unpublished shards of other plans.

        WriteError if the split is already published with other content.
        """
        published = self._existing is not None and self.split in self._existing.splits
        numbers = {int(m["number"]) for m in self._names() if m["split"] == self.split}
        shards: dict[int, ShardIndex] = {}
        foreign: list[str] = []
        for number in sorted(numbers):
            name = plan.shard_name(number)
            index = self._index(name)
            if index is None or index.plan != plan.digest or number >= plan.num_shards:
                foreign.append(name)
            elif not index.keys or self.storage.size(name) == index.bytes:
                # A shard whose tiles were all left out has an index without keys; publish() has removed its tar.
                shards[number] = index
        if published and (foreign or not shards):
            raise WriteError(
                f"{self.storage.address()}: already contains split {self.split!r}, with other tiles or settings; "
                "choose another folder, or delete it"
            )
        for name in foreign:
            self.storage.remove(name)
            self.storage.remove(index_path(name))
        return shards

    def publish(self, plan: WritePlan, shards: dict[int, ShardIndex]) -> Manifest:
        """Add the finished split to the manifest, atomically; readers see the old one until then."""
        filled = {i: shards[i] for i in range(plan.num_shards) if shards[i].keys}
        if not filled:
            raise WriteError(f"split {self.split}: none of its tiles can be read, nothing is written")
        for number in shards.keys() - filled.keys():
            self.storage.remove(plan.shard_name(number))
        with ExitStack() as stack:
            if isinstance(self.storage, LocalStorage):
                _enter_lock(stack, self.storage.folder / ".manifest.lock", wait=True)
            # Read again under the lock: another job may have published another split in the meantime. Without this, one
            # of the two splits would be lost.
            existing = self._read_existing()
            manifest = self._merge_split(existing, plan, filled, [shards[i] for i in sorted(shards)])
            if manifest != existing:
                self.storage.write(MANIFEST, manifest.dumps().encode())
        return manifest

    def _merge_split(
        self,
        existing: Manifest | None,
        plan: WritePlan,
        filled: dict[int, ShardIndex],
        every: Sequence[ShardIndex],
    ) -> Manifest:
        infos = tuple(index.shard_info(plan.shard_name(i), self.split) for i, index in filled.items())
        if existing is not None and self.split in existing.splits:
            if existing.shards_of([self.split]) != infos:
                raise WriteError(
                    f"{self.storage.address()}: split {self.split!r} differs from the published one: "
                    "the raw data has changed; choose another folder"
                )
            return existing
        notes: Counter[str] = Counter(existing.notes if existing else {})
        examples = dict(existing.examples if existing else {})
        for index in every:
            notes.update(index.notes)
            examples = {**index.examples, **examples}
        versions = {name: version(name) for name in ("numpy", "zstandard")}
        return Manifest(
            format_version=FORMAT_VERSION,
            spec=self._spec,
            shards=(*(existing.shards if existing else ()), *infos),
            notes=dict(sorted(notes.items())),
            examples=dict(sorted(examples.items())),
            codec=self._codec,
            created_with={"maestro_scale": __version__, **versions},
            seed=self._seed,
        )

    def _read_existing(self) -> Manifest | None:
        if self.storage.size(MANIFEST) is None:
            return None
        try:
            existing = Manifest.load(self.url)
        except ManifestError as error:
            raise WriteError(f"cannot add a split to the existing dataset: {error}") from error
        mine = replace(existing, spec=self._spec, codec=self._codec, seed=self._seed)
        if mine != existing:
            what = next(n for n in ("spec", "codec", "seed") if getattr(mine, n) != getattr(existing, n))
            found, wanted = getattr(existing, what), getattr(mine, what)
            if what == "spec":
                same_name = self._spec.name == existing.spec.name
                found, wanted = (
                    repr(existing.spec.name),
                    "another one" if same_name else repr(self._spec.name),
                )
            raise WriteError(
                f"{self.storage.address()}: contains a dataset with {what} {found}, not {wanted}; "
                "choose another folder"
            )
        return existing

    def _check_existing_files(self) -> None:
        """Refuse a folder with unknown files: they could be overwritten or be mistaken for shards."""
        names = set(self.storage.list_names())
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
            if index is None or index.dataset != self._spec.name:
                raise WriteError(
                    f"{self.storage.address(name)}: is not a shard that maestro-scale wrote for {self._spec.name}; "
                    "move it, or choose another folder"
                )

    def _lock(self, stack: ExitStack, folder: Path) -> None:
        """Exclude other writers: one that writes the whole split excludes all others, parts exclude only equal parts.

        Each kind takes its own lock first and then checks those of the other kind. With this order at least one of two
        writers that start at the same time sees the other.
        """
        whole = folder / f".{self.split}.lock"
        part = f".{self.split}.part-{self._part.number}-of-{self._part.count}.lock"
        try:
            if self._part.count > 1:
                _enter_lock(stack, folder / part, wait=False)
                _require_unlocked(whole)
            else:
                _enter_lock(stack, whole, wait=False)
                for other in folder.glob(f".{self.split}.part-*.lock"):
                    _require_unlocked(other)
            for leftover in folder.glob(f".{self.split}-*.tmp"):
                found = _FILE.match(leftover.name[1:])
                if found and self._part.includes(int(found["number"])):
                    leftover.unlink(missing_ok=True)
        except Locked as error:
            raise WriteError(
                f"{folder}: another process is writing split {self.split!r}; wait for it"
            ) from error
        except OSError as error:
            raise WriteError(f"{folder}: cannot be written ({error.strerror})") from error

    def _names(self) -> Iterator[re.Match[str]]:
        return (m for m in map(_FILE.fullmatch, self.storage.list_names()) if m)

    def _index(self, shard_name: str) -> ShardIndex | None:
        name = index_path(shard_name)
        try:
            return ShardIndex.loads(self.storage.read(name), self.storage.address(name))
        except (FileNotFoundError, ManifestError):
            return None


def _enter_lock(stack: ExitStack, path: Path, wait: bool) -> None:
    try:
        stack.enter_context(file_lock(path, wait))
    except OSError as error:
        # The lock only guards against a user mistake, a second writer. A file system without locks is still usable.
        if not locks_unsupported(error):
            raise
        path.unlink(missing_ok=True)


def _require_unlocked(path: Path) -> None:
    """Locked if a writer holds this lock. Repeated, since another process may hold it briefly for the same check."""
    for _ in range(_LOCK_CHECKS):
        try:
            with ExitStack() as stack:
                _enter_lock(stack, path, wait=False)
            return
        except Locked:
            time.sleep(0.1)
    raise Locked(str(path))


@contextmanager
def staging_folder(dst: str) -> Iterator[Path]:
    """Folder for temporary files.

    A local ``dst`` itself, so that publishing is a rename within one file system; for an object store a temporary
    folder, from which files are uploaded.
    """
    folder = local_folder(dst)
    if folder is None:
        with TemporaryDirectory(prefix="maestro-scale-") as temporary:
            yield Path(temporary)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder}: the folder cannot be created ({error.strerror})") from error
    yield folder
