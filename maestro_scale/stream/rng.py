"""Counter-based random numbers: pure functions of (seed, purpose, dataset, position), with no state to save.

Philox maps (key, counter) to random words. The key is (seed, purpose and dataset), the counter names the position, for
example (epoch, sample). So a number never depends on rank, worker, process id, time or what was drawn before
(invariant 1), and any position is reached in constant time.

Only raw words are used: NumPy guarantees the stream of a bit generator, but may change the algorithms of
``Generator`` (integers, permutation, …) between versions. The conversions below must never change either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

_WORD = 2**64


class Purpose(IntEnum):
    """Purpose of random numbers, part of the Philox key; purposes never share numbers. Never change the values."""

    ORDER = 1
    SAMPLE = 2
    REPLACEMENT = 3


class CounterRNG:
    """A Philox generator that seeks to any position in constant time (about 2 µs).

    ``dataset``: index of the dataset in the mixture, so that two datasets never share random numbers.
    """

    def __init__(self, seed: int, purpose: Purpose, dataset: int = 0) -> None:
        self._key = np.array([seed % _WORD, (purpose << 32) + dataset], np.uint64)
        self._philox = np.random.Philox(key=self._key)
        self._start = self._philox.state  # of a new generator: an empty buffer
        self._counter = self._start["state"]["counter"]

    def seek(self, first: int, second: int = 0, third: int = 0) -> CounterRNG:
        """Move to the start of the stream named by three numbers in [0, 2**64); returns self.

        The lowest word of the counter starts at 0 and counts the blocks of four words within the stream, so streams do
        not overlap. Buffer and position are reset: words left from an earlier stream must not be used.
        """
        counter = self._counter  # its lowest word stays 0
        counter[1], counter[2], counter[3] = third, second, first
        self._philox.state = self._start
        return self

    def words(self, count: int) -> np.ndarray:
        """(count,) uint64, uniform."""
        return self._philox.random_raw(count)

    def below(self, limit: int) -> int:
        """An integer in [0, limit); the bias is below limit / 2**64, negligible for samples and offsets."""
        return scaled(int(self._philox.random_raw()), limit)

    def half_words(self, count: int) -> np.ndarray:
        """(count,) uint32, uniform, for :func:`uniforms`: the low half of each word first."""
        return self._philox.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]

    def uniforms(self, count: int) -> np.ndarray:
        """(count,) float32 as of :func:`uniforms`."""
        return uniforms(self.half_words(count))

    def permutation(self, count: int) -> np.ndarray:
        """(count,) int64: 0 … count - 1 in random order; the stable sort makes it the same on every machine."""
        return np.argsort(self.words(count), kind="stable")


def scaled(word: int, limit: int) -> int:
    """An integer in [0, limit) from a word: what :meth:`CounterRNG.below` draws."""
    return word * limit // _WORD


def uniforms(half_words: np.ndarray) -> np.ndarray:
    """float32 in [0, 1), multiples of 2**-24, so that every value is exact and none rounds to 1."""
    return (half_words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def seed_without(seed: int, absent: Sequence[str]) -> int:
    """The seed of tiles that lack sensors: ``seed`` if they lack none, else another one for each set of sensors, so
    that their random numbers do not depend on what other tiles lack."""
    return seed + stream_id("without " + "+".join(absent)) if absent else seed


def stream_id(name: str) -> int:
    """A stream number for a name: never 0, which is the common stream, and independent of what other names exist."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1
