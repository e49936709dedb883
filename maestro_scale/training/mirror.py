"""A second home for checkpoints, behind a URL: each is copied there after its commit, fetched if all else is lost."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fsspec

log = logging.getLogger(__name__)

_MARKER = "COMMIT.json"


class Mirror:
    """``url``/<name of the checkpoint>. Copies in the background; a failure is a warning and never stops training."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._thread = ThreadPoolExecutor(1, "maestro-mirror")
        self._sending: list[Future[None]] = []

    def send(self, checkpoint: Path, keep: list[str]) -> None:
        """Copy a committed checkpoint, its marker last; then remove mirrored ones that are not in ``keep``."""
        self._sending = [f for f in self._sending if not f.done()]
        self._sending.append(self._thread.submit(self._send, checkpoint, keep))

    def wait(self) -> None:
        """Wait for what is being sent."""
        for sending in self._sending:
            sending.result()

    def newest(self) -> str | None:
        """Name of the newest whole checkpoint there, or None."""
        fs, root = fsspec.url_to_fs(self.url)
        fs.invalidate_cache()
        markers = fs.glob(f"{root}/step_*/{_MARKER}")
        return max((m.split("/")[-2] for m in markers), default=None)

    def fetch(self, name: str, into: Path) -> None:
        """Copy a mirrored checkpoint into a new directory ``into``."""
        fs, root = fsspec.url_to_fs(self.url)
        shutil.rmtree(into, ignore_errors=True)
        for remote in fs.find(f"{root}/{name}"):
            local = into / remote.split(f"/{name}/", 1)[1]
            local.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(remote, str(local))

    def _send(self, checkpoint: Path, keep: list[str]) -> None:
        try:
            fs, root = fsspec.url_to_fs(self.url)
            files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file()]
            for path in sorted(files, key=lambda p: p.name == _MARKER):
                remote = f"{root}/{checkpoint.name}/{path.relative_to(checkpoint)}"
                fs.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
                fs.put_file(str(path), remote)
            fs.invalidate_cache()
            for marker in fs.glob(f"{root}/step_*/{_MARKER}"):
                if marker.split("/")[-2] not in keep:
                    fs.rm_file(marker)  # first: what is left is not whole
                    fs.rm(marker.rsplit("/", 1)[0], recursive=True)
        except Exception as error:  # noqa: BLE001 - whatever a remote store does, training goes on
            log.warning("%s is not mirrored to %s: %s", checkpoint.name, self.url, error)
