"""Mirror of checkpoints behind a URL: each is copied there after its commit, and restored if all others are lost.

One process mirrors to a place at a time: it holds a lease from its first copy until all are sent. So a second run, or a
copy of the same run, cannot overwrite or remove the checkpoints of the first; it trains on, and warns that it is not
mirrored. A complete checkpoint is never replaced by one of the same name with different content.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import fsspec

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError
from maestro_scale.shards.lease import Lease, LeaseLost
from maestro_scale.shards.local_storage import LocalStorage
from maestro_scale.shards.locks import Locked
from maestro_scale.shards.storage import open_storage
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.commit import MARKER
from maestro_scale.training.checkpoint.identity import differences
from maestro_scale.training.checkpoint.retention import Retention

log = logging.getLogger(__name__)
LEASE = ".mirror.lease"
_NAME = re.compile(r"step_\d{1,15}")


class MirrorError(MaestroError):
    """The mirror cannot be read, or contains checkpoints of another run; the message says which and what to do."""


class ForeignMirror(MirrorError):
    """The mirror contains checkpoints of another run."""


class Mirror:
    """``url``/<name of the checkpoint>. Copies in the background; a failure is a warning and never stops training.

    ``retention`` applies to the mirror independently of the run directory.
    """

    def __init__(self, url: str, retention: Retention) -> None:
        self.url = url.rstrip("/")
        self._retention = retention
        self._thread = ThreadPoolExecutor(1, "maestro-mirror")
        self._sending: list[tuple[Path, Future[None]]] = []
        self._identity: dict[str, Any] = {}
        self._lease: Lease | None = None

    def claim(self, identity: dict[str, Any], required: bool) -> None:
        """Set the identity of the run, which must be that of the checkpoints in the mirror, if there are any.

        MirrorError if they are of another run. If the mirror cannot be read: MirrorError if ``required``, else a
        warning.
        """
        self._identity = identity
        try:
            self._check_identity()
        except ForeignMirror:
            raise
        except MirrorError as error:
            if required:
                raise
            log.warning("%s", error)

    def send(self, checkpoint: Path) -> None:
        """Copy a committed checkpoint, its marker last; then remove superseded ones.

        Earlier checkpoints that still wait in the queue are dropped unless they are permanent: if checkpoints are
        written faster than they can be sent, the newest and the permanent ones are mirrored.
        """
        waiting = [(p, f) for p, f in self._sending if not f.done()]
        self._sending = [
            (p, f) for p, f in waiting if self._retention.is_permanent(step_of(p)) or not f.cancel()
        ]
        self._sending.append((checkpoint, self._thread.submit(self._send, checkpoint)))

    @property
    def unsent(self) -> set[str]:
        """Names of checkpoints that are being sent or queued, and must not be removed yet."""
        return {path.name for path, future in self._sending if not future.done()}

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until the queue is sent, and let others mirror here; ``alive`` is called every second."""
        for _, sending in self._sending:
            while not wait([sending], timeout=1).done:
                alive()
        released, self._lease = self._lease, None
        if released is not None:
            released.release()

    def names(self) -> list[str]:
        """Names of the complete checkpoints in the mirror, newest first. MirrorError if it cannot be read."""
        return self._read(lambda fs, root: sorted(_complete(fs, root), reverse=True))

    def fetch(self, name: str, into: Path) -> None:
        """Copy a mirrored checkpoint into a new directory ``into``. MirrorError if it cannot be read."""
        shutil.rmtree(into, ignore_errors=True)

        def copy(fs: Any, root: str) -> None:
            # Only what the marker lists: the place may hold other objects, of any size and name.
            marker = _content(fs, f"{root}/{name}/{MARKER}") or b""
            for inner in (*commit.content(marker)["files"], MARKER):
                local = into / inner
                local.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(f"{root}/{name}/{inner}", str(local))

        self._read(copy)

    def _identities(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, identity) of the mirrored checkpoints whose markers are intact, newest first."""
        for name in self.names():
            marker = self._read(lambda fs, root, name=name: _content(fs, f"{root}/{name}/{MARKER}") or b"")
            try:
                yield name, untrusted.field_of(commit.content(marker), dict, "identity")
            except (ValueError, KeyError):
                continue  # damaged: the next one counts

    def _check_identity(self) -> None:
        for name, theirs in self._identities():
            if difference := differences(theirs, self._identity):
                raise ForeignMirror(
                    f"checkpoint.mirror: {self.url}/{name} is of another run: {difference}. Set another "
                    "checkpoint.mirror or another --run-dir, whose last component is the folder in the mirror"
                )
            return

    def _read(self, action: Any) -> Any:
        try:
            fs, root = fsspec.url_to_fs(self.url)
            fs.invalidate_cache()
            return action(fs, root)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MirrorError(
                f"checkpoint.mirror: {self.url} cannot be read ({reason}): check the address, credentials and "
                "network, or remove checkpoint.mirror"
            ) from error

    def _send(self, checkpoint: Path) -> None:
        try:
            if self._lease is None:
                self._check_identity()  # also if the lease is held: this error says more
                self._lease = self._acquire()
                self._check_identity()  # another run may have sent its first checkpoint in between
            fs, root = fsspec.url_to_fs(self.url)
            fs.invalidate_cache()
            self._copy(fs, root, checkpoint)
            fs.invalidate_cache()
            steps = {step_of(Path(name)): name for name in _complete(fs, root)}
            for step in self._retention.superseded(steps):
                self._check_lease()
                fs.rm_file(f"{root}/{steps[step]}/{MARKER}")  # first: without it, the rest is never loaded
                fs.rm(f"{root}/{steps[step]}", recursive=True)
        except Exception as error:  # noqa: BLE001 - no failure of a remote store may stop training
            log.warning("%s is not mirrored to %s: %s", checkpoint.name, self.url, error)

    def _copy(self, fs: Any, root: str, checkpoint: Path) -> None:
        files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file()]
        target = f"{root}/{checkpoint.name}"
        sizes = {path: info["size"] for path, info in fs.find(target, detail=True).items()}
        marker = _content(fs, f"{target}/{MARKER}")
        if marker is not None and not _is_intact(marker):
            self._check_lease()
            fs.rm_file(f"{target}/{MARKER}")
            marker = None
        if marker is not None and marker != (checkpoint / MARKER).read_bytes():
            raise MirrorError(
                "a checkpoint of this name with different content is already there, and is kept: another copy of this "
                "run has mirrored it; set another checkpoint.mirror or another --run-dir"
            )
        remotes = {path: f"{target}/{path.relative_to(checkpoint)}" for path in files}
        if marker is not None and all(_size(sizes, r) == p.stat().st_size for p, r in remotes.items()):
            return
        if marker is None and sizes:
            self._check_lease()
            fs.invalidate_cache()
            fs.rm(target, recursive=True)  # of a copy that was killed, or damaged
        # s3fs: fail if the object exists. The lease does not exclude a process that was stopped for long in this place.
        options = {"mode": "create"} if marker is None and self.url.startswith(("s3://", "s3a://")) else {}
        for path in sorted(files, key=lambda p: p.name == MARKER):
            self._check_lease()
            fs.makedirs(remotes[path].rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(path), remotes[path], **options)

    def _acquire(self) -> Lease:
        storage = open_storage(self.url)
        if isinstance(storage, LocalStorage):
            storage.folder.mkdir(parents=True, exist_ok=True)
        lease = Lease(storage, LEASE)
        try:
            # A run that was killed and starts again must not give up because of its own lease.
            lease.acquire(watch=True)
        except Locked as error:
            raise MirrorError(
                f"another process mirrors to it ({error}); if it is not a run to be stopped, set another "
                "checkpoint.mirror or another --run-dir"
            ) from error
        return lease

    def _check_lease(self) -> None:
        assert self._lease is not None  # _send has acquired it
        try:
            self._lease.check()
        except LeaseLost as error:
            self._lease = None
            raise MirrorError(
                "this process did not respond for long, and another one mirrors to it now"
            ) from error


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def _complete(fs: Any, root: str) -> list[str]:
    names = [marker.split("/")[-2] for marker in fs.glob(f"{root}/step_*/{MARKER}")]
    return [name for name in names if _NAME.fullmatch(name)]


def _is_intact(marker: bytes) -> bool:
    """Whether a marker is what some revision wrote; one of a later revision must stay as it is."""
    try:
        commit.content(marker)
    except commit.NewerFormatError:
        return True
    except ValueError:
        return False
    return True


def _content(fs: Any, path: str) -> bytes | None:
    try:
        untrusted.check_size(fs.size(path), path)
        content: bytes = fs.cat_file(path)
    except FileNotFoundError:
        return None
    return content


def _size(sizes: dict[str, int], remote: str) -> int | None:
    """The size of a remote file; file systems list some paths with a leading slash, and some without."""
    return next((size for path, size in sizes.items() if path.lstrip("/") == remote.lstrip("/")), None)
