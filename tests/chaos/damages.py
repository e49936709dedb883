"""Damage to files of a shard cache while it is in use: flip, truncate, delete, replace."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

FLIPPED, TRUNCATED, DELETED, REPLACED = "flipped", "truncated", "deleted", "replaced"
DAMAGES = (FLIPPED, TRUNCATED, DELETED, REPLACED)


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Damage one file. Replaced: another file of the same size under its name; the others change the file itself."""
    if kind == DELETED:
        path.unlink()
        return
    size = path.stat().st_size
    if kind == REPLACED:
        other = path.with_name(f".damage-{path.name}")
        other.write_bytes(rng.randbytes(min(size, 100_000)).ljust(size, b"\0"))
        os.replace(other, path)
        return
    with path.open("r+b") as file:
        if kind == TRUNCATED:
            file.truncate(rng.randrange(size))
            return
        file.seek(place := rng.randrange(size))
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << rng.randrange(8))]))


class CacheDamager:
    """Damages random shards of a cache at random moments, in a thread, while the context is open.

    Only complete shards that no process holds open: a verified shard that is in use is read through its mapping, and
    nobody but this project writes there. The next process that opens it must notice the change.
    """

    def __init__(
        self, cache: Path, rng: random.Random, mean_s: float, on_damage: Callable[[str], None]
    ) -> None:
        self._cache, self._rng, self._mean_s, self._on_damage = cache, rng, mean_s, on_damage
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> CacheDamager:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._rng.uniform(0, 2 * self._mean_s)):
            shards = sorted((self._cache / "shards").glob("*.tar"))
            if not shards:
                continue
            path, kind = self._rng.choice(shards), self._rng.choice(DAMAGES)
            with contextlib.suppress(OSError, ValueError):  # evicted meanwhile
                if _damage_if_unused(path, kind, self._rng):
                    self._on_damage(kind)


def _damage_if_unused(path: Path, kind: str, rng: random.Random) -> bool:
    """Damage a file unless a process has it open (holds a shared lock on it); whether it was damaged."""
    import fcntl

    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        damage(path, kind, rng)
        return True
