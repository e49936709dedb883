"""The stored maps are of the first tiles of a split, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maestro_scale.evaluation.tasks.first_maps import FirstMaps

TILES = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)


class Ranks:
    """As many ranks as were asked so far; the last one hears what all gave."""

    def __init__(self):
        self.device, self.given = torch.device("cpu"), []

    def maxima(self, values):
        return [2.0]

    def sum(self, values):
        self.given.append(values)
        return torch.stack(self.given).sum(0)


def maps(tiles):
    return {"truth": tiles, "answer": 255 - tiles}


@pytest.mark.parametrize("cuts", [[], [1], [3], [1, 2], [5]])
def test_any_number_of_ranks(cuts):
    ranks = Ranks()
    for part in np.split(np.arange(6), cuts):
        mine = FirstMaps(6)
        for number in part:
            mine.add(int(number), maps(TILES[number : number + 1]))
        found = mine.gather(ranks if cuts else None)
    assert set(found) == {"truth", "answer"}
    np.testing.assert_array_equal(found["truth"], TILES[:4])
    np.testing.assert_array_equal(found["answer"], 255 - TILES[:4])


def test_several_at_once_and_none():
    few = FirstMaps(3)
    few.add(0, maps(TILES[:2]))
    few.add(2, maps(TILES[2:]))
    np.testing.assert_array_equal(few.gather(None)["truth"], TILES[:3])
    nothing = FirstMaps(3)
    nothing.add(0, None)
    assert nothing.gather(None) is None
