"""Random numbers that are a pure function of what they are for, without any state to save.

Philox is a counter-based generator: the key is (seed, purpose and dataset), the counter names the draw. Only
its raw words are used, since NumPy promises never to change those, but not what its methods make of them.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np

_WORD = 2**64


class Purpose(IntEnum):
    """What numbers are drawn for; each purpose has its own. The values must never change."""

    ORDER = 1
    SAMPLE = 2
    REPLACEMENT = 3


class CounterRNG:
    """A source of random numbers that can be moved to any place in constant time (about 2 µs).

    ``dataset``: place of the dataset in the mixture, so that two datasets never share random numbers.
    """

    def __init__(self, seed: int, purpose: Purpose, dataset: int = 0) -> None:
        self._key = np.array([seed % _WORD, (purpose << 32) + dataset], np.uint64)
        self._philox = np.random.Philox(key=self._key)

    def seek(self, first: int, second: int = 0, third: int = 0) -> CounterRNG:
        """Move to the start of the stream named by three numbers in [0, 2**64); returns self."""
        self._philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, third, second, first], np.uint64), "key": self._key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self

    def words(self, count: int) -> np.ndarray:
        """(count,) uint64, uniform."""
        return self._philox.random_raw(count)

    def below(self, limit: int) -> int:
        """An integer in [0, limit), for limits far below 2**64."""
        return int(self._philox.random_raw()) * limit // _WORD

    def uniforms(self, count: int) -> np.ndarray:
        """(count,) float32 in [0, 1), multiples of 2**-24."""
        words = self.words((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
        return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)

    def permutation(self, count: int) -> np.ndarray:
        """(count,) int64: 0 … count - 1 in random order."""
        return np.argsort(self.words(count), kind="stable")


def stream_id(name: str) -> int:
    """A stream number for a name: never 0, and independent of which other names there are."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1
