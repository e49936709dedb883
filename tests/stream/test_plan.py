"""The order of samples: invariants 2 and 3, for any dataset, batch and world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_scale.stream.plan import SampleOrder, SampleOrderError


@st.composite
def plans(draw: st.DrawFn, whole_batches: bool = False) -> SampleOrder:
    """Plans of a few shards; at least one global batch of samples if ``whole_batches``."""
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any))
    lanes = draw(st.sampled_from([1, 2, 4, 6, 8]))
    global_batch = lanes * draw(st.integers(1, 5))
    if whole_batches and sum(counts) < global_batch:
        counts = [*counts, global_batch]
    window = draw(st.integers(1, 50))
    return SampleOrder(
        counts, draw(st.integers(0, 2**64 - 1)), lanes, global_batch, window, draw(st.integers(0, 3))
    )


def worlds(plan: SampleOrder) -> list[int]:
    return [r for r in range(1, plan.lanes + 1) if plan.lanes % r == 0]


def epoch_of(plan: SampleOrder, epoch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    return np.concatenate([plan.at(epoch, step, rank, world) for step in range(plan.steps_per_epoch)])


@given(plans(whole_batches=True), st.integers(0, 2**40))
def test_an_epoch_uses_every_sample_at_most_once_and_leaves_out_less_than_a_batch(
    plan: SampleOrder, epoch: int
):
    ids = epoch_of(plan, epoch)
    assert len(ids) == len(set(ids.tolist())) == plan.steps_per_epoch * plan.global_batch
    assert set(ids.tolist()) <= set(range(plan.num_samples))
    assert plan.num_samples - len(ids) < plan.global_batch


@given(plans(), st.integers(0, 100))
def test_too_few_samples_are_repeated_as_often_as_needed_and_no_more(plan: SampleOrder, epoch: int):
    ids = epoch_of(plan, epoch)
    assert len(ids) == len(set(ids.tolist()))
    assert plan.steps_per_epoch >= 1
    times = np.bincount(ids % plan.num_samples, minlength=plan.num_samples)
    assert times.max() <= plan.num_copies
    assert plan.num_copies == 1 or (plan.num_copies - 1) * plan.num_samples < plan.global_batch


@given(plans(), st.integers(0, 100), st.data())
def test_a_global_batch_is_the_same_set_on_any_number_of_ranks(
    plan: SampleOrder, epoch: int, data: st.DataObject
):
    step = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    whole = plan.at(epoch, step)
    for world in worlds(plan):
        parts = [plan.at(epoch, step, rank, world) for rank in range(world)]
        assert {len(p) for p in parts} == {plan.global_batch // world}
        assert sorted(np.concatenate(parts).tolist()) == sorted(whole.tolist())


@given(plans(), st.integers(0, 100), st.data())
def test_any_step_is_found_without_those_before_it(plan: SampleOrder, epoch: int, data: st.DataObject):
    step = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    walked = epoch_of(plan, epoch)[step * plan.global_batch : (step + 1) * plan.global_batch]
    for cache in (plan._window_ids, plan._within, plan._shard_order):
        cache.cache_clear()
    assert plan.at(epoch, step).tolist() == walked.tolist()


@given(plans(), st.integers(0, 20), st.data())
def test_upcoming_shards_are_those_used_and_in_time(plan: SampleOrder, epoch: int, data: st.DataObject):
    world = data.draw(st.sampled_from(worlds(plan)))
    rank = data.draw(st.integers(0, world - 1))
    start = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    told = list(plan.upcoming_shards(epoch, start, rank, world))
    steps = [step for step, _ in told]
    assert steps == sorted(steps)
    used = set()
    for step in range(start, plan.steps_per_epoch):
        shards, _ = plan.locate(plan.at(epoch, step, rank, world))
        used |= set(shards.tolist())
        assert set(shards.tolist()) <= {shard for enters, shard in told if enters <= step}
    assert used == {shard for _, shard in told}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), st.integers(1, 3))
def test_locate_finds_shard_and_index_of_every_copy(counts: list[int], copies: int):
    total = sum(counts)
    plan = SampleOrder(counts, 0, 1, copies * total, 4)
    expected = [(s, i) for s, n in enumerate(counts) for i in range(n)] * copies
    shards, indices = plan.locate(np.arange(copies * total))
    assert list(zip(shards.tolist(), indices.tolist(), strict=True)) == expected


@pytest.mark.parametrize("counts", [(67,), (20, 20, 27)])
def test_another_rest_is_left_out_every_epoch(counts: tuple[int, ...]):
    plan = SampleOrder(counts, 5, 4, 16, 8)
    rests = [frozenset(range(67)) - set(epoch_of(plan, e).tolist()) for e in range(60)]
    assert {len(r) for r in rests} == {3}
    assert len(set(rests)) > 30
    assert len(frozenset().union(*rests)) > 50


@pytest.mark.parametrize("counts", [(256,), (32,) * 8])
def test_neighbours_are_separated(counts: tuple[int, ...]):
    plan = SampleOrder(counts, 1, 4, 16, 64)
    ids = epoch_of(plan, 0)
    assert np.mean(np.abs(np.diff(ids)) == 1) < 0.05
    assert ids.tolist() != epoch_of(plan, 1).tolist()
    assert ids.tolist() != epoch_of(SampleOrder(counts, 2, 4, 16, 64), 0).tolist()
    assert ids.tolist() != epoch_of(SampleOrder(counts, 1, 4, 16, 64, dataset=1), 0).tolist()


def test_the_order_stays_what_it_was():
    # A change here breaks the resumption of every run in progress.
    assert SampleOrder((5, 3, 4), 7, 2, 4, 3).at(2, 1).tolist() == [5, 3, 9, 11]


def test_rank_r_owns_interleaved_lanes():
    plan = SampleOrder((50,), 0, 6, 12, 4)
    assert [list(plan.lanes_of(rank, 3)) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [list(plan.lanes_of(rank, 2)) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert list(plan.lanes_of(0, 1)) == [0, 1, 2, 3, 4, 5]
    # The whole batch is lane after lane, two samples each: those of lanes 1 and 4 are at 2, 3, 8 and 9.
    whole = plan.at(0, 1).tolist()
    assert plan.at(0, 1, rank=1, world=3).tolist() == [whole[i] for i in (2, 3, 8, 9)]


def test_a_lane_is_a_contiguous_part_of_the_shuffled_shards():
    # 24 samples, one shard, no shuffling by windows of 1: 4 lanes of 6 follow each other in the shard's random order.
    plan = SampleOrder((24,), 3, 4, 8, 1)
    order = plan._within(0, 0).tolist()
    assert sorted(order) == list(range(24))
    for lane in range(4):
        mine = [sample for step in range(3) for sample in plan.at(0, step, lane, 4).tolist()]
        assert mine == order[6 * lane : 6 * lane + 6]


def test_window_boundaries_differ_by_lane():
    # Windows of 8 samples, 4 lanes of 24: lane n's first one is shorter by n * 8 / 4 samples.
    plan = SampleOrder((96,), 0, 4, 8, 8)
    bounds = [[plan._bounds(lane, window) for window in range(4)] for lane in range(4)]
    assert bounds[0] == [(0, 8), (8, 16), (16, 24), (24, 24)]
    assert bounds[1] == [(0, 6), (6, 14), (14, 22), (22, 24)]
    assert bounds[3] == [(0, 2), (2, 10), (10, 18), (18, 24)]
    assert [plan._window_of(3, position) for position in (0, 1, 2, 9, 10)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("num_samples", "global_batch", "copies", "steps"),
    [(8, 8, 1, 1), (7, 8, 2, 1), (4, 8, 2, 1), (3, 8, 3, 1), (17, 8, 1, 2)],
)
def test_a_dataset_is_repeated_only_up_to_one_global_batch(num_samples, global_batch, copies, steps):
    plan = SampleOrder((num_samples,), 0, 1, global_batch, 4)
    assert (plan.num_copies, plan.steps_per_epoch, plan.lane_length) == (copies, steps, steps * global_batch)


def test_epochs_datasets_and_lanes_share_no_order():
    # Six permutations of 30 samples each that could be alike by a forgotten part of a key.
    def within(epoch: int, dataset: int, shard: int) -> tuple[int, ...]:
        return tuple(SampleOrder((30, 30), 0, 2, 20, 30, dataset)._within(epoch, shard).tolist())

    assert len({within(e, d, s) for e in (0, 1) for d in (0, 1) for s in (0, 1)}) == 8

    def shard_order(epoch: int, dataset: int) -> tuple[int, ...]:
        return tuple(SampleOrder((2,) * 30, 0, 2, 20, 30, dataset)._shard_order(epoch)[0].tolist())

    assert len({shard_order(e, d) for e in (0, 1) for d in (0, 1)}) == 4

    def place_of_first(epoch: int, lane: int, window: int) -> tuple[int, ...]:
        # Where in its window the samples of a window go: the permutation alone.
        plan = SampleOrder((60,), 0, 2, 20, 10)
        start, stop = plan._bounds(lane, window)
        (part,) = plan._slices(epoch, lane, start, stop)
        before = (plan._within(epoch, 0)[part[1] : part[2]]).tolist()
        return tuple(before.index(sample) for sample in plan._window_ids(epoch, lane, window).tolist())

    assert len({place_of_first(e, lane, w) for e in (0, 1) for lane, w in ((0, 0), (0, 1), (1, 1))}) == 6


def test_a_position_outside_of_the_epoch_or_the_ranks_is_refused():
    plan = SampleOrder((17,), 0, 2, 8, 4)
    assert len(plan.at(0, 1)) == 8
    with pytest.raises(IndexError, match="step 2 of an epoch of 2 steps"):
        plan.at(0, 2)
    with pytest.raises(SampleOrderError, match="rank 2 of 2 ranks"):
        plan.lanes_of(2, 2)


def test_a_lane_needs_few_shards_at_a_time():
    plan = SampleOrder((10,) * 1000, 0, 8, 16, 40)
    assert all(
        len({s for _, s in plan._first_uses(0, lane, 3, plan._bounds(lane, 3)[0])}) <= 5 for lane in range(8)
    )


def test_the_middle_of_a_hundred_million_samples_is_computed_directly():
    plan = SampleOrder((2000,) * 50_000, 0, 256, 4096, 4096)
    first = plan.at(3, plan.steps_per_epoch // 2, 5, 64)
    assert len(first) == 64
    assert plan._window_ids.cache_info().misses == 4  # one window for each lane of this rank


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (((10,), 0, 3, 8, 4), "lanes 3 do not divide the global batch 8"),
        (((0, 0), 0, 1, 8, 4), "no samples"),
        (((10,), 0, 1, 8, 0), "window is 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: tuple, reason: str):
    with pytest.raises(SampleOrderError, match=reason):
        SampleOrder(*arguments)


def test_a_world_that_does_not_divide_the_lanes_is_refused():
    with pytest.raises(SampleOrderError, match="3 ranks do not divide 4 lanes"):
        SampleOrder((10,), 0, 4, 8, 4).at(0, 0, 0, 3)


@pytest.mark.parametrize(("lanes", "global_batch"), [(0, 8), (-1, 8), (4, 0), (4, -4)])
def test_lanes_and_batches_below_one_are_refused(lanes: int, global_batch: int):
    with pytest.raises(
        SampleOrderError, match=f"lanes {lanes} do not divide the global batch {global_batch}"
    ):
        SampleOrder((10,), 0, lanes, global_batch, 4)


def test_negative_steps_and_ranks_are_refused():
    plan = SampleOrder((17,), 0, 2, 8, 4)
    with pytest.raises(IndexError, match="step -1 of an epoch of 2 steps"):
        plan.at(0, -1)
    with pytest.raises(SampleOrderError, match="rank -1 of 2 ranks"):
        plan.lanes_of(-1, 2)
    with pytest.raises(SampleOrderError, match="0 ranks do not divide 2 lanes"):
        plan.lanes_of(0, 0)


def test_upcoming_shards_are_ordered_by_their_first_use():
    # One lane, three steps of 2 samples per window of 6; shards of 2 samples, so a window needs several.
    plan = SampleOrder((2,) * 12, 9, 1, 2, 6)
    for start in range(plan.steps_per_epoch):
        expected: list[tuple[int, int]] = []
        for window in range(start // 3, 4):
            steps = range(max(3 * window, start), 3 * window + 3)
            uses = [(s, shard) for s in steps for shard in plan.locate(plan.at(4, s))[0].tolist()]
            expected += [(steps[0], shard) for shard in dict.fromkeys(shard for _, shard in sorted(uses))]
        assert list(plan.upcoming_shards(4, start, 0, 1)) == expected


def test_caches_hold_two_epochs_and_two_windows_of_every_lane():
    # Fewer would compute a permutation again at every step; more would hold memory that is not used.
    plan = SampleOrder((40,) * 4, 0, 4, 8, 8)
    sizes = [c.cache_info().maxsize for c in (plan._shard_order, plan._within, plan._window_ids)]
    assert sizes == [2, 64, 8]
