"""A real S3 server on this machine: Ceph's RADOS gateway."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).parents[3]
SERVICE = Path(os.environ.get("MAESTRO_SERVICES", REPO.parent / "shared" / "services")) / "s3"
NEEDED = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "ceph", "curl")
BUCKET = "shards"


def why_not() -> str | None:
    """Why no server can be started on this machine, or None."""
    if os.geteuid() != 0:
        return "Ceph needs root"
    if missing := [n for n in NEEDED if shutil.which(n) is None]:
        packages = "ceph-mon ceph-osd ceph-mgr radosgw ceph-common"
        return f"Ceph is not installed (apt-get install {packages}): no {', '.join(missing)}"
    if not SERVICE.exists():
        return f"{SERVICE}, which starts a server, is not here (MAESTRO_SERVICES)"
    return None


@dataclass
class Server:
    """One server; ``env`` points clients to it."""

    env: dict[str, str] = field(default_factory=dict)

    def up(self) -> None:
        """Start it with an empty bucket; returns once it responds."""
        for _ in range(3):  # on a busy machine Ceph's daemons may fail to find each other
            done = subprocess.run([SERVICE, "up"], capture_output=True, text=True, timeout=240, check=False)
            self.env = dict(re.findall(r"(AWS_\w+)=(\S+)", done.stdout))
            with contextlib.suppress(OSError, KeyError):  # or no response
                self.files().mkdir(BUCKET)
                return
        raise AssertionError(f"{SERVICE} up: no answer\n{done.stdout}{done.stderr}")

    def down(self) -> None:
        """Stop it; its data is deleted."""
        subprocess.run([SERVICE, "down"], capture_output=True, timeout=60, check=False)

    @property
    def port(self) -> int:
        """Its port on 127.0.0.1."""
        return int(self.env["AWS_ENDPOINT_URL"].rpartition(":")[2])

    def files(self):
        """A new client."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            key=self.env["AWS_ACCESS_KEY_ID"],
            secret=self.env["AWS_SECRET_ACCESS_KEY"],
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def through(self, port: int) -> dict[str, str]:
        """``env`` for a proxy on another port."""
        return {**self.env, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
