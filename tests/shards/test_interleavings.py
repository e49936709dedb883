"""Two writers on one object store, in every order of their requests that matters: nothing published is ever damaged."""

from __future__ import annotations

import hashlib
import threading

import pytest
import s3fs
from shards.interleaved import Interleaver, Scenario, Schedule, shards_of
from shards.kit import TILE_BYTES, Toy
from shards.s3 import reset

from maestro_scale.remote import reader
from maestro_scale.shards import lease
from maestro_scale.shards.errors import WriteError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.verify import verify
from maestro_scale.shards.write.writer import write_shards

SMALL = 4 * TILE_BYTES / 1e6


@pytest.fixture(scope="module")
def interleaver():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    reset(server.get_host_and_port()[1])
    between = Interleaver(server.get_host_and_port()[1])
    options = reader._s3_options

    def own_endpoint(retry):
        """The endpoint of the writer whose thread connects; its lease connects in the same thread."""
        name = threading.current_thread().name
        return {**options(retry), "endpoint_url": between.endpoint(name if name in ("a", "b") else "a")}

    with pytest.MonkeyPatch.context() as patch:
        s3fs.S3FileSystem.clear_instance_cache()
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setattr(reader, "_s3_options", own_endpoint)
        patch.setattr(lease, "SETTLE_S", 0.01)
        patch.setattr(lease, "POLL_S", 0.01)
        s3fs.S3FileSystem(endpoint_url=between.endpoint("a")).mkdir("shards")
        yield between
    between.close()
    server.stop()


def writer(url, dataset, split, **options):
    return lambda: write_shards(dataset, url, split, shard_mb=SMALL, **options)


PAIRS = {
    "other settings": lambda url: {
        "a": writer(url, Toy(5), "train"),
        "b": writer(url, Toy(6), "train"),
    },
    "equal settings": lambda url: {
        "a": writer(url, Toy(5), "train"),
        "b": writer(url, Toy(5), "train"),
    },
    "two splits": lambda url: {
        "a": writer(url, Toy(3), "train"),
        "b": writer(url, Toy(4), "val"),
    },
}


def check(interleaver, url, results, where):
    """Whatever happened: what is published is intact, and each writer either published or says in a line why not."""
    files = s3fs.S3FileSystem(endpoint_url=interleaver.endpoint("a"), use_listings_cache=False)
    prefix = url.removeprefix("s3://")
    objects = {p.rpartition("/")[2]: d for p, d in files.cat(files.ls(prefix, refresh=True)).items()}
    scenario = interleaver.scenario
    if scenario.conditions != "kept" and scenario.late:
        # A manifest on its way for longer than a lease may show for a moment; its writer then puts the other one back.
        interleaver.manifests[:] = [objects["manifest.json"]]
    for published in interleaver.manifests:
        for split, path, sha256 in shards_of(published):
            assert hashlib.sha256(objects[path]).hexdigest() == sha256, (where, split, path)
    final = shards_of(objects["manifest.json"])
    for earlier in interleaver.manifests:
        assert set(shards_of(earlier)) <= set(final), (where, "a published split disappeared")
    for result in results.values():
        if isinstance(result, Manifest):
            assert {(s.split, s.path, s.sha256) for s in result.shards} <= set(final), where
        else:
            assert isinstance(result, WriteError), (where, result)
            assert "\n" not in str(result)
    records = (".train.split.json", ".val.split.json") if interleaver.scenario.conditions != "kept" else ()
    hidden = [name for name in objects if name.startswith(".") and name not in records]
    assert hidden == [], (where, hidden)
    assert verify(url) == [], where


KEPT, EXPIRES = Scenario(), Scenario(late=1000)
IGNORED, REFUSED = Scenario("ignored"), Scenario("refused")
# (pair, scenario, requests of a, then of b, then of a (all, if not given); then the rest of b). A writer makes about 33
# requests.
# The lease of a is held from its 2nd to its 32nd; with EXPIRES, b takes it over while a is paused.
ALL = 10**6
CASES = [
    *(("other settings", EXPIRES, first, ALL) for first in range(2, 33, 3)),
    *(("equal settings", EXPIRES, first, ALL) for first in range(3, 33, 6)),
    *(("two splits", EXPIRES, first, ALL) for first in range(15, 33, 3)),
    *(("other settings", EXPIRES, first, then) for first in (12, 20) for then in (6, 22)),
    *(("other settings", KEPT, first, ALL) for first in (0, 1, 2, 12, 31, ALL)),
    *(("equal settings", KEPT, first, ALL) for first in (1, 13, ALL)),
    *(
        ("two splits", KEPT, first, then)
        for first, then in ((1, ALL), (12, 12), (17, 18), (24, ALL), (29, 12))
    ),
    *((pair, IGNORED, first, ALL) for pair in PAIRS for first in (1, 14)),
    *((pair, REFUSED, first, ALL) for pair in PAIRS for first in (2, 20)),
    *(("other settings", Scenario("ignored", late=1000), first, ALL) for first in (8, 24)),
    *(("two splits", Scenario("ignored", late=1000), first, ALL) for first in (16, 23)),
    ("two splits", Scenario("refused", late=1000), 14, 25),
    # The 25th request of a writes the manifest, between the record of b and its look at the manifest.
    *(("other settings", Scenario("ignored", late=1000), 24, then, 1) for then in (18, 19, 20, 21, 22)),
]


@pytest.mark.slow
@pytest.mark.parametrize("group", range(3))
def test_no_interleaving_damages_what_is_published(interleaver, group):
    assert len(CASES) >= 50
    for number, (pair, scenario, *requests) in enumerate(CASES):
        if number % 3 == group:
            url = f"s3://shards/case{number}"
            results = interleaver.run(scenario, Schedule(*requests), PAIRS[pair](url))
            check(interleaver, url, results, (results, pair, scenario, requests))
            published = [r for r in results.values() if isinstance(r, Manifest)]
            assert published, (results, pair, scenario, requests)
            if pair == "two splits":
                assert len(published) == 2, (results, scenario, requests)
                splits = Manifest.loads(interleaver.manifests[-1]).splits
                assert sorted(splits) == ["train", "val"], (results, scenario, requests)
            elif pair == "other settings":
                assert len(published) == 1, (results, scenario, requests)
