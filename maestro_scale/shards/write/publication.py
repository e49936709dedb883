"""Publication of a split: adding it to the manifest, which other writers may change at the same time.

The manifest is written on condition that it is the one that was read and merged. Stores that ignore such conditions are
the reason for the records of :mod:`.merge`: a writer that was stopped for long may replace the manifest there after
another has taken over its split.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.errors import ManifestError, ShardsError, WriteError, one_line
from maestro_scale.shards.format.checksum import (
    CHECKSUM,
    read_manifest_bytes,
    remove_checksum,
    write_checksum,
)
from maestro_scale.shards.format.manifest import MANIFEST, Manifest
from maestro_scale.shards.local_storage import ConditionFailed, Snapshot
from maestro_scale.shards.storage import RemoteStorage, Storage
from maestro_scale.shards.write.exclusion import WriterLock
from maestro_scale.shards.write.merge import (
    SplitDiffers,
    add_recorded,
    add_split,
    has_record,
    only_split,
    without_split,
    write_record,
)

log = logging.getLogger(__name__)
_MAX_PUBLICATIONS = 20  # attempts while other writers change the manifest


class PublishedManifest:
    """The manifest at a destination, as far as a writer of ``split`` reads and changes it."""

    def __init__(self, storage: Storage, split: str, spec: DatasetSpec, codec: str, seed: int) -> None:
        self._storage, self._split = storage, split
        self._spec, self._codec, self._seed = spec, codec, seed

    def read_verified(self) -> Manifest | None:
        """The manifest, compared with its checksum file; None if there is none."""
        try:
            data = read_manifest_bytes(self._storage)
        except FileNotFoundError:
            return None
        except ManifestError as error:
            raise WriteError(f"cannot add a split to the existing dataset: {error}") from error
        return self._parse(data)

    def read(self) -> tuple[Manifest | None, Snapshot | None]:
        """The manifest as it is now, and what a conditional write needs; (None, None) if there is none.

        Without its checksum, which does not match while another writer publishes.
        """
        try:
            snapshot = self._storage.read_snapshot(MANIFEST)
        except FileNotFoundError:
            return None, None
        return self._parse(snapshot.data), snapshot

    def add(self, added: Manifest, lock: WriterLock) -> Manifest:
        """Add the split of ``added``, atomically, and return the manifest that contains it.

        SplitDiffers if another writer has published the split with other content; WriteError after too many changes by
        others.
        """
        unordered = isinstance(self._storage, RemoteStorage) and not self._storage.conditional
        changed = False
        if unordered:
            # Nothing but leases orders the writes of such a store, and they cannot stop a request on its way.
            write_record(self._storage, added)
        try:
            for attempt in range(_MAX_PUBLICATIONS):
                # Read again: another job may have published another split in the meantime. Without this, and without
                # the condition of the write, one of the two splits would be lost.
                existing, snapshot = self.read()
                known = add_recorded(self._storage, existing, added) if unordered else existing
                try:
                    manifest = add_split(known, added, self._storage.address())
                except SplitDiffers:
                    if unordered and existing is not None:
                        # Its own record would say to the writer of the published split that it was replaced.
                        write_record(self._storage, only_split(existing, self._split))
                    raise
                if manifest == existing:  # also after one's own write: then it has not been replaced
                    if unordered and changed and not has_record(self._storage, added):
                        self._restore_split(existing, added)
                    return manifest
                remove_checksum(self._storage)
                changed = True
                if unordered:
                    lock.check()  # as late as possible
                try:
                    self._storage.write_snapshot(MANIFEST, manifest.dumps().encode(), snapshot)
                except ConditionFailed:
                    time.sleep(random.uniform(0, min(0.05 * 2**attempt, 5)))
        finally:
            if changed:
                self._write_checksum()
        raise WriteError(
            f"{self._storage.address(MANIFEST)}: other writers changed it {_MAX_PUBLICATIONS} times; run the same "
            "command again, finished shards are kept"
        )

    def _restore_split(self, existing: Manifest, added: Manifest) -> None:
        """Put the split of another writer back, which published it while the write of ``added`` was on its way.

        SplitDiffers then. If the other writer has given up, ``added`` remains.
        """
        restored = add_recorded(self._storage, without_split(existing, self._split), added, also_same=True)
        if restored is None or self._split not in restored.splits:
            write_record(self._storage, added)
            return
        if restored.shards_of([self._split]) == added.shards:
            return  # the other writer has recorded what is published
        self._storage.write(MANIFEST, restored.dumps().encode())
        raise SplitDiffers(
            f"{self._storage.address()}: split {self._split!r} was published by another writer while this one did not "
            "respond; its shards are kept"
        )

    def _write_checksum(self) -> None:
        try:
            write_checksum(self._storage)
        except ShardsError as error:
            # It is optional, and a failure must not hide why the manifest was not written.
            log.warning("%s: is not written: %s", self._storage.address(CHECKSUM), one_line(error))

    def _parse(self, data: bytes) -> Manifest:
        """WriteError if it describes a dataset that this split cannot be added to."""
        try:
            existing = Manifest.loads(data, self._storage.address(MANIFEST))
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
                f"{self._storage.address()}: contains a dataset with {what} {found}, not {wanted}; "
                "choose another folder"
            )
        return existing
