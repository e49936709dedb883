"""Leases: locks between writers on any machines, as a small object with an owner that is renewed until it is released.

An object store has no locks that end with their holder, so a lease expires: another writer may take it over once it was
not renewed for its lifetime. Whether it expired is decided by the storage's own clock or, if the storage has none, by
watching it for a whole lifetime; clocks of two machines are never compared. A holder that was stopped for longer than
the lifetime finds at its next renewal that it lost the lease.

Where the storage has conditional writes, exactly one of two writers gets the lease. Where it has none, a writer reads
the object again a moment after writing it, and the last one to write has the lease.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType

from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.shards.errors import StoreError, WriteError
from maestro_scale.shards.local_storage import ConditionFailed, LocalStorage, Snapshot
from maestro_scale.shards.locks import Locked
from maestro_scale.shards.storage import RemoteStorage, Storage
from maestro_scale.untrusted import load_json
from maestro_scale.untrusted.limits import KIB, Limits

log = logging.getLogger(__name__)
LIFETIME_S = 60.0
SETTLE_S = 0.5  # without conditional writes: time until the own lease is read again
POLL_S = 1.0  # while waiting for another holder
_RENEWALS = 4  # per lifetime
_CLOCK_S = 2.0  # Last-Modified has whole seconds, and the servers of one store may differ a little
_MAX_LIFETIME_S = 3600.0
_LIMITS = Limits(bytes=16 * KIB, entries=20, depth=2)


class LeaseLost(Exception):
    """The lease was taken over by another writer, since it was not renewed in time."""


@dataclass(frozen=True)
class _Content:
    """Content of a lease object; the attributes are the JSON keys."""

    owner: str  # random, so that no two writers have the same
    host: str
    pid: int
    process: str  # boot, PID namespace, PID and start time, see _process_name
    lifetime_s: float
    renewals: int  # changes at every renewal, so that watching the content shows that the owner is alive

    @classmethod
    def parse(cls, data: bytes) -> _Content | None:
        """None if the object is not a lease, for example because it was written by something else."""
        try:
            content = cls(**load_json(data, limits=_LIMITS))
            valid = 0 < float(content.lifetime_s) <= _MAX_LIFETIME_S and isinstance(content.process, str)
        except (ValueError, TypeError):
            return None
        return content if valid else None

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def who(self) -> str:
        """The holder, for messages."""
        return f"process {self.pid!r:.20} on {self.host!r:.100}"


class Lease:
    """A lease of the object ``name``. ``with Lease(storage, name): …`` takes it, renews it and releases it.

    Entering raises :class:`.locks.Locked` if another writer holds it, with a message that says who and when it expires.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = name
        self._lifetime_s = LIFETIME_S
        # A storage with short deadlines: a renewal that takes longer than the lifetime is of no use.
        policy = RetryPolicy.with_deadline(self._lifetime_s / 2)
        self._storage: Storage = storage.with_retry(policy) if isinstance(storage, RemoteStorage) else storage
        self._content = _Content(
            secrets.token_hex(16),
            socket.gethostname(),
            os.getpid(),
            _process_name(os.getpid()),
            self._lifetime_s,
            0,
        )
        self._tag: str | None = None
        self._renewed = 0.0
        self._lost = False
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self, wait_s: float = 0.0, watch: bool = False) -> None:
        """Take the lease; Locked, with a message, if another writer holds it.

        wait_s: wait so long for other holders, one after the other.
        watch: wait until the present holder has either renewed it, which is Locked, or let it expire.
        """
        while True:
            expired = self.wait_until_free(wait_s, watch)
            try:
                self._tag = self._storage.write_snapshot(self.name, self._content.dump(), expired)
            except ConditionFailed:
                if self._is_ours():
                    break  # the response to an earlier attempt of the same request was lost
                continue  # another writer was faster: wait_until_free decides
            if self._storage.conditional or (expired is None and isinstance(self._storage, LocalStorage)):
                break  # only one of several writers can create the file, or the object
            time.sleep(SETTLE_S)
            if self._is_ours():
                break
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name="maestro-lease", daemon=True)
        self._thread.start()

    def wait_until_free(self, wait_s: float = 0.0, watch: bool = False) -> Snapshot | None:
        """The expired lease, or None if there is none. Locked, with a message, as in :meth:`acquire`."""
        started = since = time.monotonic()
        first: bytes | None = None
        while True:
            try:
                found = self._storage.read_snapshot(self.name)
            except FileNotFoundError:
                return None
            if found.age_s is not None and found.age_s < -_CLOCK_S:
                found = replace(found, age_s=None)  # the servers of the store disagree about the time
            renewed = first is not None and found.data != first
            if first is None or renewed:
                first, since = found.data, time.monotonic()
            holder = _Content.parse(found.data)
            left_s = self._left_s(holder, found, time.monotonic() - since)
            if left_s <= 0:
                return found
            if wait_s:
                give_up = time.monotonic() - started > wait_s
            else:
                give_up = renewed or not (watch or found.age_s is None)
            if give_up:
                who = holder.who if holder else "another process"
                raise Locked(
                    f"{who} holds {self._storage.address(self.name)}, which expires in {left_s:.0f} s"
                )
            time.sleep(min(left_s, POLL_S, self._lifetime_s / 20))

    def check(self) -> None:
        """Renew the lease now. LeaseLost if another writer has taken it over."""
        with self._lock:
            if self._lost:
                raise LeaseLost(self._storage.address(self.name))
            self._renew()

    def release(self) -> None:
        """Stop renewing, and remove the object. If that fails, the lease expires."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._lost:
            return
        with suppress(StoreError, WriteError, LeaseLost, FileNotFoundError, OSError):
            # It may only be removed while it cannot have been taken over.
            if time.monotonic() - self._renewed > self._lifetime_s / 2:
                self._renew()
            self._storage.remove(self.name)

    def _keep(self) -> None:
        while not self._released.wait(self._lifetime_s / _RENEWALS):
            try:
                self.check()
            except LeaseLost:
                return
            except (StoreError, WriteError) as error:
                log.warning("%s: cannot be renewed, the next attempt follows: %s", self.name, error)

    def _renew(self) -> None:
        started = time.monotonic()
        content = _Content(**{**asdict(self._content), "renewals": self._content.renewals + 1})
        if not self._storage.conditional and not self._is_ours():
            self._fail()
        try:
            self._tag = self._storage.write_snapshot(self.name, content.dump(), Snapshot(b"", self._tag))
        except ConditionFailed:
            # Also after a lost response to a renewal: then the object is ours, with a tag that was not known yet.
            if not self._is_ours():
                self._fail()
            try:
                self._tag = self._storage.write_snapshot(self.name, content.dump(), Snapshot(b"", self._tag))
            except ConditionFailed:
                if not self._is_ours():
                    self._fail()
        self._content, self._renewed = content, started

    def _fail(self) -> None:
        self._lost = True
        raise LeaseLost(self._storage.address(self.name))

    def _is_ours(self) -> bool:
        try:
            found = self._storage.read_snapshot(self.name)
        except FileNotFoundError:
            return False
        holder = _Content.parse(found.data)
        if holder is None or holder.owner != self._content.owner:
            return False
        self._tag = found.tag
        return True

    def _left_s(self, holder: _Content | None, found: Snapshot, unchanged_s: float) -> float:
        """Seconds until a lease expires that was not changed for ``unchanged_s``; 0 if its holder ended."""
        if holder is not None and _has_ended(holder.process):
            return 0.0
        lifetime_s = float(holder.lifetime_s) if holder is not None else LIFETIME_S
        if found.age_s is None:
            return lifetime_s - unchanged_s
        return lifetime_s + _CLOCK_S - found.age_s


def _process_name(pid: int) -> str:
    """Identifies a process among all machines that write to a storage; empty where /proc does not say.

    With the PID namespace, because containers of one machine may have equal PIDs, and with the start time, because the
    kernel gives a PID again.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        with open(f"/proc/{pid}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
        if state in "ZX":  # ended, and not yet waited for by its parent
            return ""
        start = fields[18]
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {start}"
    except (OSError, IndexError):
        return ""


def _has_ended(process: str) -> bool:
    """Whether a process was one of this machine (and PID namespace) and has ended."""
    parts, mine = process.split(), _process_name(os.getpid()).split()
    if len(parts) != 4 or len(mine) != 4 or parts[:2] != mine[:2] or not parts[2].isdigit():
        return False
    return _process_name(int(parts[2])) != process
