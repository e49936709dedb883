"""The manifests of a job: compared by all ranks before the first step, recorded, and checked for changes meanwhile.

Order of the samples, scales and shards all follow from the manifests. If one digit differed on one rank, the ranks
would train on different inputs without any error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError
from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.shards.errors import ManifestError, StoreError
from maestro_scale.shards.format.checksum import MANIFEST, sha256_hex
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.manifest_cache import load_manifest, mapped_manifest
from maestro_scale.shards.storage import open_storage
from maestro_scale.training.binding import Launch
from maestro_scale.training.distributed import World, exchange_texts

log = logging.getLogger(__name__)

# A check is not worth a delay: while the store does not answer, the other ranks wait for this one.
_CHECK_RETRY = RetryPolicy(deadline_s=5.0, attempt_timeout_s=5.0)


class ManifestMismatchError(MaestroError):
    """The ranks of a job have read different manifests."""

    same_on_all_ranks = True


@dataclass(frozen=True)
class UsedDataset:
    """A dataset that a job uses. ``name``: within the job; ``manifest``: as it was read when the job started;
    ``splits``: those that the job reads."""

    name: str
    url: str
    manifest: Manifest
    splits: tuple[str, ...]


def load_manifests(urls: Sequence[str], cache_dir: Path, world: World | None) -> list[Manifest]:
    """The manifests at ``urls``, read and parsed by one rank of each node and mapped by the others; a collective.

    A rank reads a manifest itself if its address is another one than that of the rank that reads, or if it cannot map
    the manifest because its ``cache_dir`` is not that of the other ranks of the node.
    ManifestError, the same on all ranks, if one rank cannot read a manifest.
    """
    if world is None or world.size == 1:
        return [load_manifest(url, cache_dir) for url in urls]
    mine: list[Manifest] = []
    answer = None
    if world.local_rank == 0:
        try:
            mine = [load_manifest(url, cache_dir) for url in urls]
            answer = json.dumps({"read": [[url, m.digest] for url, m in zip(urls, mine, strict=True)]})
        except ManifestError as error:
            answer = json.dumps({"error": str(error)})
    answers = [json.loads(text) if text else None for text in world.gather(answer)]
    for found in answers:
        if found is not None and "error" in found:
            raise ManifestError(found["error"])
    # Of the rank of this node that has read them, where the ranks of a node are consecutive. Elsewhere it may be one of
    # another node: all of these have the same digests, as ``compare_manifests`` makes sure.
    read = next(found for found in reversed(answers[: world.rank + 1]) if found is not None)
    digests = dict(read["read"])
    mapped = [mapped_manifest(cache_dir, digests[url]) if url in digests else None for url in urls]
    return mine or [
        manifest or load_manifest(url, cache_dir) for url, manifest in zip(urls, mapped, strict=True)
    ]


def manifest_digests(datasets: Sequence[UsedDataset]) -> dict[str, str]:
    """{name: digest of the manifest}, as checkpoints, results and models record it."""
    return {d.name: d.manifest.digest for d in datasets}


def compare_manifests(world: World | None, datasets: Sequence[UsedDataset]) -> None:
    """ManifestMismatchError, on all ranks, unless all of them have read the same manifests; a collective."""
    if world is None or world.size == 1:
        return
    compare_digests(world.gather(json.dumps(manifest_digests(datasets))))


def compare_manifests_of_launch(launch: Launch, datasets: Sequence[UsedDataset]) -> None:
    """As :func:`compare_manifests`, for ranks that form no process group.

    Nothing is compared where the launcher gives no address of rank 0: such ranks need not even run at the same time.
    """
    if launch.size > 1 and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        compare_digests(exchange_texts(launch, json.dumps(manifest_digests(datasets))))


def compare_digests(texts: Sequence[str | None]) -> None:
    """As :func:`compare_manifests`, given ``manifest_digests`` of every rank as JSON, in order of rank."""
    every: list[dict[str, str]] = [json.loads(text or "{}") for text in texts]
    for name in dict.fromkeys(name for digests in every for name in digests):
        ranks: dict[str, list[int]] = {}
        for rank, digests in enumerate(every):
            ranks.setdefault(digests.get(name, "none"), []).append(rank)
        if len(ranks) > 1:
            found = ", ".join(f"{_ranks_text(those)}: {digest[:12]}" for digest, those in ranks.items())
            raise ManifestMismatchError(
                f"{name}: the ranks have read different manifests (SHA-256 of {MANIFEST} of {found}); give all nodes "
                "the same shards, then start again"
            )


def _ranks_text(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-3`` or ``ranks 0, 2-3``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


@dataclass
class ManifestMonitor:
    """Reports when a manifest is no longer the one that the job started with, once for each new content.

    The job itself is not affected: it never reads the file again, and verifies each shard against the manifest that it
    started with. But its next start reads the new one.
    """

    datasets: Sequence[UsedDataset]
    warn: Callable[[str], None] = log.warning
    _reported: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Read each manifest again and warn of changes; nothing is raised. To be called on one rank."""
        for dataset in self.datasets:
            digest, problem = _changed(dataset)
            if problem is not None and self._reported.get(dataset.name) != digest:
                self.warn(problem)
                self._reported[dataset.name] = digest


def _changed(dataset: UsedDataset) -> tuple[str, str | None]:
    """(digest of the present file, the warning if it has changed)."""
    storage = open_storage(dataset.url, _CHECK_RETRY)
    started, data, effect, change = dataset.manifest, b"", "", "has changed"
    try:
        data = storage.read(MANIFEST, untrusted.MANIFEST.bytes)
        if sha256_hex(data) == started.digest:
            return started.digest, None
        present = Manifest.loads(data)
        if present.digest_of(dataset.splits) == started.digest_of(dataset.splits):
            effect = "; what the job uses is the same in both"
    except StoreError:
        return "", None  # not reachable now: reading shards reports that, if it matters
    except FileNotFoundError:
        change = "was removed"
    except ManifestError:
        change = "has changed and cannot be used"
    effect = effect or "; restore it before you start the job again, which will read the new one"
    return sha256_hex(data), (
        f"{storage.address(MANIFEST)}: the manifest of {dataset.name} {change} while this job runs, which continues "
        f"with the manifest that it started with (SHA-256 {started.digest[:12]}){effect}"
    )
