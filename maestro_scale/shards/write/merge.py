"""Merging of a split into a manifest, and records of published splits for stores without conditional requests.

In such a store, a request of a writer that was stopped for long may replace a newer manifest, in which another split,
or the same one, was published. So each writer first writes a record of its split, and reads the records again after it
has written the manifest: whoever writes last finds what its manifest lacks, and adds it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version

from maestro_scale import __version__
from maestro_scale.shards.errors import ManifestError, WriteError
from maestro_scale.shards.format.index import ShardIndex
from maestro_scale.shards.format.manifest import FORMAT_VERSION, Manifest
from maestro_scale.shards.storage import Storage
from maestro_scale.shards.write.packing import WritePlan, WrittenShard

_RECORD = re.compile(r"\.(?P<split>[A-Za-z0-9_-]+)\.split\.json")


class SplitDiffers(WriteError):
    """The split was published with other content."""


def split_manifest(
    plan: WritePlan,
    codec: str,
    seed: int,
    filled: Iterable[WrittenShard],
    every: Sequence[ShardIndex],
    synthetic: bool | None = None,
) -> Manifest:
    """The manifest of one split alone: its shards, and the notes of all indices, also those of empty shards."""
    notes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for index in every:
        notes.update(index.notes)
        examples = {**index.examples, **examples}
    versions = {name: version(name) for name in ("numpy", "zstandard")}
    return Manifest(
        format_version=FORMAT_VERSION,
        spec=plan.spec,
        shards=tuple(shard.index.shard_info(shard.name, plan.split) for shard in filled),
        notes=dict(sorted(notes.items())),
        examples=dict(sorted(examples.items())),
        codec=codec,
        created_with={"maestro_scale": __version__, **versions},
        seed=seed,
        synthetic=synthetic,
    )


def add_split(existing: Manifest | None, added: Manifest, where: str) -> Manifest:
    """``existing`` with the one split of ``added``. SplitDiffers if it has that split with other shards.

    Of two examples of a note the smaller one is kept, so that they do not depend on which split was published first.
    """
    if existing is None:
        return added
    (split,) = added.splits
    if split in existing.splits:
        if existing.shards_of([split]) != added.shards:
            raise SplitDiffers(
                f"{where}: split {split!r} differs from the published one: another writer has published it, or the raw "
                "data has changed; choose another folder"
            )
        return existing
    both = existing.examples.keys() & added.examples.keys()
    smaller = {note: min(existing.examples[note], added.examples[note]) for note in both}
    return replace(
        added,
        shards=(*existing.shards, *added.shards),
        notes=dict(sorted((Counter(existing.notes) + Counter(added.notes)).items())),
        examples=dict(sorted({**added.examples, **existing.examples, **smaller}.items())),
        synthetic=_is_synthetic(existing, added),
    )


def _is_synthetic(a: Manifest, b: Manifest) -> bool | None:
    """Of both together: synthetic tiles in one split are enough; unknown where one is unknown and the other real."""
    if a.synthetic or b.synthetic:
        return True
    return a.synthetic if a.synthetic == b.synthetic else None


def write_record(storage: Storage, added: Manifest) -> None:
    """Record that the one split of ``added`` is being published."""
    (split,) = added.splits
    storage.write(f".{split}.split.json", added.dumps().encode())


def has_record(storage: Storage, added: Manifest) -> bool:
    """Whether the record of the split is still that of ``added``."""
    (split,) = added.splits
    try:
        return storage.read(f".{split}.split.json") == added.dumps().encode()
    except FileNotFoundError:
        return False


def only_split(existing: Manifest, split: str) -> Manifest:
    """``existing`` with one of its splits alone."""
    return replace(existing, shards=existing.shards_of([split]))


def without_split(existing: Manifest, split: str) -> Manifest | None:
    """``existing`` without a split; None if it has no other."""
    shards = tuple(shard for shard in existing.shards if shard.split != split)
    return replace(existing, shards=shards) if shards else None


def add_recorded(
    storage: Storage, existing: Manifest | None, added: Manifest, also_same: bool = False
) -> Manifest | None:
    """``existing`` with the recorded splits that it lacks, except that of ``added`` unless ``also_same``.

    A record counts if it is of the same dataset, and its shards are there: a dataset may have been deleted without it.
    """
    names = storage.list_names()
    for name in names:
        match = _RECORD.fullmatch(name)
        known = (existing.splits if existing else ()) + (() if also_same else added.splits)
        if match is None or match["split"] in known:
            continue
        try:
            record = Manifest.loads(storage.read(name), storage.address(name))
        except (FileNotFoundError, ManifestError):
            continue
        same = replace(record, spec=added.spec, codec=added.codec, seed=added.seed) == record
        if same and record.splits == (match["split"],) and {s.path for s in record.shards} <= set(names):
            existing = add_split(existing, record, storage.address())
    return existing
