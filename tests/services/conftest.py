"""An S3 server for the tests of a file."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.s3.server import Server, why_not


@pytest.fixture(scope="module")
def ceph() -> Iterator[Server]:
    """A running server with the bucket ``shards``; only one can run per machine: other test files wait for it."""
    if reason := why_not():
        pytest.skip(reason)
    with Path("/tmp/s3.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        server = Server()
        try:
            server.up()
            yield server
        finally:
            server.down()
