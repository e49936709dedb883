"""Which files a shard cache holds, in SQLite, so that a download neither lists the folder nor asks for a file's size.

    files   name (``<sha256>.tar`` or ``.part``), bytes, part (a download), last_use in ns, as far as it is known
    total   the sum of the bytes, kept by triggers
    boots   machines, by boot, that have compared the folder with this index

A row is written before its file and deleted after it, so the files never take more than the rows say, whenever a
process is killed; a row without its file is found and deleted when its turn comes. SQLite undoes what a killed process
has not committed. Only a crash of the machine can lose rows: after each boot, and where there is no index, as in the
caches of earlier revisions, or a damaged one, the first process lists the folder once.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from maestro_scale.shards.errors import StoreError
from maestro_scale.shards.locks import file_lock

FILE = re.compile(r"[0-9a-f]{64}\.(tar|part)")
_VERSION = 1
_WAIT_S = 120.0  # for another process, which may be listing a large folder
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SCHEMA = """
CREATE TABLE files (name TEXT PRIMARY KEY, bytes INTEGER, part INTEGER, last_use INTEGER) WITHOUT ROWID;
CREATE INDEX oldest ON files (part, last_use, name, bytes);
CREATE TABLE total (bytes INTEGER);
INSERT INTO total VALUES (0);
CREATE TABLE boots (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TRIGGER added AFTER INSERT ON files BEGIN UPDATE total SET bytes = bytes + new.bytes; END;
CREATE TRIGGER removed AFTER DELETE ON files BEGIN UPDATE total SET bytes = bytes - old.bytes; END;
"""

T = TypeVar("T")

# SQLite's locks do not survive a fork in the middle of a transaction of another thread.
_not_while_forking = threading.RLock()
os.register_at_fork(
    before=_not_while_forking.acquire,
    after_in_parent=_not_while_forking.release,
    after_in_child=_not_while_forking.release,
)


@dataclass(frozen=True)
class CachedFile:
    """A row of the index."""

    name: str
    bytes: int
    last_use: int


@dataclass(frozen=True)
class CacheIndex:
    """The index of the folder ``folder``/shards. Every method is one short transaction, safe among processes."""

    folder: Path

    def reserve(self, name: str, num_bytes: int, budget_bytes: int) -> int:
        """Count a download ``name`` if it fits into the budget; the bytes by which it does not, or 0."""

        def add(connection: sqlite3.Connection) -> int:
            # Not by REPLACE, which runs no trigger for the row that it deletes.
            connection.execute("DELETE FROM files WHERE name = ?", (name,))
            (used,) = connection.execute("SELECT bytes FROM total").fetchone()
            excess = max(used + num_bytes - budget_bytes, 0)
            if not excess:
                connection.execute("INSERT INTO files VALUES (?, ?, 1, 0)", (name, num_bytes))
            return int(excess)

        return self._run(add)

    def complete(self, part: str, name: str, last_use: int) -> None:
        """The download ``part`` has become the shard ``name``; nothing if another process has said so already."""

        def rename(connection: sqlite3.Connection) -> None:
            if connection.execute("SELECT 1 FROM files WHERE name = ?", (part,)).fetchone() is None:
                return
            connection.execute("DELETE FROM files WHERE name = ?", (name,))
            connection.execute(
                "UPDATE files SET name = ?, part = 0, last_use = ? WHERE name = ?", (name, last_use, part)
            )

        self._run(rename)

    def drop(self, name: str) -> None:
        """The file is gone."""
        self._run(lambda c: c.execute("DELETE FROM files WHERE name = ?", (name,)))

    def set_last_use(self, name: str, last_use: int) -> None:
        """Correct the time of last use."""
        self._run(lambda c: c.execute("UPDATE files SET last_use = ? WHERE name = ?", (last_use, name)))

    def parts(self) -> list[str]:
        """Names of the downloads, those of killed processes too."""
        return self._run(lambda c: [name for (name,) in c.execute("SELECT name FROM files WHERE part = 1")])

    def oldest(self, after: CachedFile | None, count: int) -> list[CachedFile]:
        """The next ``count`` shards after one, in the order of their last use."""
        begin = (-1, "") if after is None else (after.last_use, after.name)
        query = (
            "SELECT name, bytes, last_use FROM files WHERE part = 0 AND (last_use, name) > (?, ?) "
            "ORDER BY last_use, name LIMIT ?"
        )
        return self._run(lambda c: [CachedFile(*row) for row in c.execute(query, (*begin, count))])

    def _run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        path = self.folder / "index.sqlite"
        try:
            with _not_while_forking:
                try:
                    with self._transaction(path) as connection:
                        return action(connection)
                except sqlite3.DatabaseError as error:
                    if isinstance(error, sqlite3.OperationalError):
                        raise
                # Damaged, by a crash of the machine. Listed again.
                with file_lock(self.folder / "locks" / "index.lock"):
                    for damaged in (path, path.with_name(path.name + "-journal")):
                        damaged.unlink(missing_ok=True)
                    with self._transaction(path) as connection:
                        return action(connection)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"{path}: cannot be used ({error}); set data.cache_dir to a local disk with free space"
            ) from error

    @contextmanager
    def _transaction(self, path: Path) -> Iterator[sqlite3.Connection]:
        # A connection per transaction: none is held over a fork, or when the cache is removed.
        with closing(sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)) as connection:
            # What the system has written survives a killed process, but not a crash of the machine: see above.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA journal_mode = TRUNCATE")
            connection.execute("BEGIN IMMEDIATE")
            self._prepare(connection)
            yield connection
            connection.execute("COMMIT")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            for statement in re.split(r";\n", _SCHEMA.strip().removesuffix(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        boot = _boot_id()
        if connection.execute("SELECT 1 FROM boots WHERE id = ?", (boot,)).fetchone() is None:
            # Rows without a file stay: another process may be about to create it.
            connection.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?)", self._listed())
            connection.execute("INSERT INTO boots VALUES (?)", (boot,))

    def _listed(self) -> Iterator[tuple[str, int, int, int]]:
        """The files of the folder as rows."""
        uses = {}
        for record in os.scandir(self.folder / "verified"):
            uses[record.name] = record
        for entry in os.scandir(self.folder / "shards"):
            # Other files, such as the shards of a dataset in a folder of this name, are neither counted nor removed.
            if not FILE.fullmatch(entry.name):
                continue
            try:
                size = entry.stat().st_size
                verified = uses.get(record_name(Path(entry.path)))
                last_use = verified.stat().st_mtime_ns if verified is not None else 0
            except FileNotFoundError:
                continue
            yield entry.name, size, int(entry.name.endswith(".part")), last_use


def record_name(path: Path, sha256: str | None = None) -> str:
    """Name of the record that the file at ``path`` was verified; ``sha256``: of it, if its name does not say so."""
    # By path as well: the same shard may be read in place from a local folder and also be in the cache.
    location = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    return f"{sha256 or path.stem}-{location}.json"


@cache
def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
