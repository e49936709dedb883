"""The evaluation loader: every sample exactly once (invariant 7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maestro_scale.stream.batch import Batch, digest
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.plan import SampleOrderError
from maestro_scale.stream.source import Source


def keys_of(batches: list[Batch]) -> list[str]:
    return [k for b in batches for k in b.keys]


@pytest.mark.parametrize(("world", "batch_size"), [(1, 7), (2, 16), (3, 100), (7, 1)])
def test_every_crop_of_every_sample_once_in_order_over_all_ranks(toy: Source, world: int, batch_size: int):
    loaders = [EvalLoader(toy, batch_size, rank, world) for rank in range(world)]
    keys = [k for loader in loaders for k in keys_of(list(loader))]
    assert keys == [f"eval/toy/{n}/{c}" for n in range(100) for c in range(4)]
    items = np.concatenate([loader.items for loader in loaders]).tolist()
    assert [f"eval/toy/{n}/{c}" for n, c in items] == keys
    assert [loader.first_row for loader in loaders] == np.cumsum([0] + [len(x.items) for x in loaders])[
        :-1
    ].tolist()
    lengths = [len(loader) for loader in loaders]
    assert max(lengths) - min(lengths) <= 1


def test_the_batches_are_the_same_on_any_number_of_ranks(toy: Source):
    alone = [b.keys for b in EvalLoader(toy, 32, crops=1)]
    assert [len(keys) for keys in alone] == [32, 32, 32, 4]
    for world in (2, 3, 5):
        assert [b.keys for r in range(world) for b in EvalLoader(toy, 32, r, world, crops=1)] == alone


def test_workers_and_passes_change_nothing(toy: Source):
    loader = EvalLoader(toy, 30)
    first = [digest(b) for b in loader]
    assert first == [digest(b) for b in loader]
    assert first == [digest(b) for b in EvalLoader(toy, 30, workers=2)]


def test_tiles_and_labels_stay_together(toy: Source):
    for batch in EvalLoader(toy, 32, crops=1):
        assert batch.targets["kind"].argmax(1).tolist() == [int(t[-1]) % 2 for t in batch.tiles]
        assert not any(bool(torch.any(n != 0)) for n in batch.noise.values())


def test_more_ranks_than_samples_leave_some_without_batches(write_toy):
    few = write_toy(2)
    assert [len(list(EvalLoader(few, 4, r, 5, workers=1, crops=1))) for r in range(5)] == [1, 0, 0, 0, 0]


def test_a_loader_left_early_ends_its_workers(toy: Source):
    batches = iter(EvalLoader(toy, 4, workers=1))
    next(batches)
    batches.close()


def test_invalid_numbers_are_refused(toy: Source):
    with pytest.raises(SampleOrderError, match="batch_size 0"):
        EvalLoader(toy, 0)


def test_crops_per_tile_are_at_most_those_that_there_are(toy: Source):
    # A tile of 60 m has 2 x 2 crops of 30 m.
    assert [EvalLoader(toy, 1, crops=crops).num_crops for crops in (None, 1, 3, 4, 9)] == [4, 1, 3, 4, 4]


def test_ranks_share_batches_as_worked_out_by_hand(write_toy):
    # 10 tiles in batches of 4 are three batches, the last of 2. Of two ranks the first has two of them, of four ranks
    # the last has none.
    source = write_toy(10)

    def rows(world: int) -> list[list[int]]:
        return [EvalLoader(source, 4, rank, world, crops=1).items[:, 0].tolist() for rank in range(world)]

    assert rows(2) == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9]]
    assert rows(4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]
    for rank in (-1, 2):
        with pytest.raises(SampleOrderError, match=f"rank {rank} of 2"):
            EvalLoader(source, 4, rank, 2)
