"""The training loader: the same samples on any number of ranks and workers, from any position."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maestro_scale.shards.read.store import BadShard, Store
from maestro_scale.stream import loader as loader_module
from maestro_scale.stream.batch import Batch, digest
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.loader import Source, TrainLoader
from maestro_scale.stream.plan import SampleOrderError
from maestro_scale.stream.workers import LoaderError, Pipeline

ORDER = {"seed": 3, "lanes": 4, "global_batch": 16, "window": 12}


def loader_of(*sources: Source, micro_batch: int = 4, **changes) -> TrainLoader:
    return TrainLoader(sources, micro_batch=micro_batch, **{**ORDER, **changes})


def digests(loader: TrainLoader, start: int, stop: int) -> list[list[str]]:
    """Of every micro-batch of the steps start + 1 … stop."""
    try:
        return [[digest(b) for b in s.batches] for s in loader.steps(start * 16, stop)]
    finally:
        loader.close()


def samples_of(batches: list[Batch]) -> dict[str, str]:
    """{key: digest of the sample alone}."""
    found = {}
    for batch in batches:
        for i, key in enumerate(batch.keys):
            found[key] = digest(replace(batch.map(lambda t, i=i: t[i : i + 1]), keys=(key,)))
    return found


def test_workers_change_nothing(toy: Source):
    alone = digests(loader_of(toy), 0, 8)
    assert alone == digests(loader_of(toy, workers=1), 0, 8)
    assert alone == digests(loader_of(toy, workers=2), 0, 8)


def test_the_shards_of_the_first_batch_are_read_while_the_processes_start(toy: Source, monkeypatch):
    expected = digests(loader_of(toy), 5, 6)
    verified = toy.store.cache_dir / "verified"
    shutil.rmtree(verified)
    read: list[int] = []

    def slow_start(*args, **options) -> Pipeline:
        deadline = time.monotonic() + 10
        while not any(verified.glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        read.append(len(list(verified.glob("*.json"))))
        return Pipeline(*args, **options)

    monkeypatch.setattr(loader_module, "Pipeline", slow_start)
    assert digests(loader_of(toy, workers=1), 5, 6) == expected
    assert read[0] >= 1


def test_no_shard_is_read_any_more_after_a_pipeline_that_cannot_start(toy: Source, monkeypatch):
    def fail(*args, **options) -> Pipeline:
        raise LoaderError("too little shared memory")

    monkeypatch.setattr(loader_module, "Pipeline", fail)
    loader = loader_of(toy, workers=1)
    with pytest.raises(LoaderError, match="too little shared memory"):
        next(loader.steps(0, 4))
    deadline = time.monotonic() + 10
    while any(t.name == "maestro-prefetch" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_resumes_at_its_position_without_replay(toy: Source):
    whole = digests(loader_of(toy), 0, 15)
    assert digests(loader_of(toy), 0, 4) == whole[:4]
    for start in (4, 5, 6, 13):
        assert digests(loader_of(toy, workers=start % 2), start, 15) == whole[start:]


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_global_batches_are_the_same_samples_bit_by_bit_on_any_number_of_ranks(toy: Source, micro_batch: int):
    alone = [samples_of(s.batches) for s in loader_of(toy, micro_batch=16).steps(0, 8)]
    for world in (2, 4):
        parts: list[dict[str, str]] = [{} for _ in alone]
        for rank in range(world):
            loader = loader_of(toy, rank=rank, world=world, micro_batch=micro_batch)
            for i, step in enumerate(loader.steps(0, 8)):
                assert {len(b) for b in step.batches} == {micro_batch}
                assert len(step.batches) * micro_batch * world == 16
                parts[i] |= samples_of(step.batches)
        assert parts == alone


def test_a_run_that_changes_its_ranks_midway_uses_every_sample_once_per_epoch(toy: Source):
    seen: Counter[str] = Counter()
    num_steps = loader_of(toy).steps_per_epoch
    for start, stop, world in ((0, 2, 1), (2, 3, 4), (3, num_steps, 2)):
        for rank in range(world):
            for step in loader_of(toy, rank=rank, world=world).steps(start * 16, stop):
                seen.update(k for b in step.batches for k in b.keys)
    assert len(seen) == num_steps * 16 == 96
    assert set(seen.values()) == {1}


def test_steps_have_their_position(toy: Source):
    loader = loader_of(toy)
    steps = list(loader.steps(5 * 16, 8))
    assert loader.steps_per_epoch == 6
    assert [(s.step, s.epoch, s.samples, s.dataset) for s in steps] == [
        (6, 0, 96, "toy"),
        (7, 1, 112, "toy"),
        (8, 1, 128, "toy"),
    ]
    assert steps[1].batches[0].keys[0].startswith("1/toy/")


def test_batches_have_the_documented_shapes_and_types(toy: Source):
    batch = next(loader_of(toy).steps(0, 1)).batches[0]
    assert {n: (t.dtype, tuple(t.shape)) for n, t in batch.pixels.items()} == {
        "aerial": (torch.uint8, (4, 1, 3, 12, 12)),
        "s2": (torch.int16, (4, 3, 2, 3, 3)),
        "s1": (torch.float32, (4, 2, 2, 3, 3)),
    }
    assert batch.dates["s2"].shape == (4, 3, 3)
    assert batch.ref_date.dtype == torch.int16
    assert {n: tuple(t.shape) for n, t in batch.targets.items()} == {"kind": (4, 2), "cover": (4, 3, 3)}
    # Labels belong to the tiles they came with.
    assert batch.targets["kind"].argmax(1).tolist() == [int(t[-1]) % 2 for t in batch.tiles]


def test_a_sample_is_replayed_from_its_key(toy: Source):
    loader = loader_of(toy, rank=1, world=2)
    batch = list(loader.steps(0, 8))[7].batches[1]
    assert digest(loader.replay(batch.keys)) == digest(batch)
    assert digest(loader_of(toy).replay(batch.keys)) == digest(batch)
    for key in ("1/else/3", "1/toy/x", "eval/toy/1/0"):
        with pytest.raises(ValueError, match="is not a key"):
            loader.replay([key])


def test_few_samples_are_repeated_with_other_random_numbers(write_toy: Callable[..., Source], caplog):
    few = write_toy(6)
    loader = loader_of(few)
    assert "has 6 samples, fewer than the global batch 16" in caplog.text
    batches = next(loader.steps(0, 1)).batches
    keys = [k for b in batches for k in b.keys]
    assert len(set(keys)) == 16
    assert Counter(t for b in batches for t in b.tiles).most_common(1)[0][1] <= 3
    assert len(set(samples_of(batches).values())) == 16


def test_a_mixture_gives_every_step_one_dataset_the_same_on_every_rank(write_toy: Callable[..., Source]):
    first, second = write_toy(40, weight=3.0), write_toy(48)
    names = {}
    for rank in (0, 1):
        loader = loader_of(first, second, rank=rank, world=2)
        steps = list(loader.steps(0, 20))
        names[rank] = [s.dataset for s in steps]
        assert all(
            b.dataset == s.dataset and b.keys[0].split("/")[1] == s.dataset for s in steps for b in s.batches
        )
    assert names[0] == names[1]
    assert Counter(names[0]) == {"toy#0": 15, "toy#1": 5}
    assert loader.steps_per_epoch == 2 + 3
    assert [s.epoch for s in steps] == [i // 5 for i in range(20)]
    resumed = [samples_of(s.batches) for s in loader.steps(7 * 16, 20)]
    assert resumed == [samples_of(s.batches) for s in steps[7:]]
    assert len({k for s in steps for b in s.batches for k in b.keys}) == 20 * 8


@pytest.mark.parametrize("workers", [1, 3])
def test_every_shard_is_prefetched_before_it_is_needed_in_shares_for_all_workers(toy: Source, workers: int):
    loader = loader_of(toy, rank=1, world=2)
    loader.workers = workers
    told: list[set[int]] = [set() for _ in range(workers)]
    for i, request in enumerate(loader._requests(3, 20)):
        told[i % workers] |= set(request.prefetch)
        # The first few requests may come before all shares were handed out.
        if i >= workers:
            assert {ref.shard for ref in request.refs} <= set().union(*told)
    assert all(told)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"micro_batch": 3}, SampleOrderError, "micro_batch 3 does not divide the 16 samples of a rank"),
        ({"world": 3}, SampleOrderError, "3 ranks do not divide 4 lanes"),
        ({"lanes": 5}, SampleOrderError, "lanes 5 do not divide the global batch 16"),
        ({"global_batch": 0}, SampleOrderError, "lanes 4 do not divide the global batch 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(toy: Source, changes: dict, error: type, reason: str):
    with pytest.raises(error, match=reason):
        loader_of(toy, **changes)


def test_another_global_batch_cannot_resume(toy: Source):
    with pytest.raises(ValueError, match="24 samples are not a whole number of steps of 16"):
        loader_of(toy).steps(24, 8)


@pytest.fixture
def damaged(write_toy: Callable[..., Source], tmp_path: Path) -> Source:
    """60 tiles, one byte of the second shard flipped."""
    source = write_toy(60)
    folder = tmp_path / "shards"
    shutil.copytree(source.store.url, folder)
    bad = folder / source.shards[1].path
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    return replace(source, store=Store(str(folder), tmp_path / "cache", 2**30))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_shard_ends_the_run_with_its_name(damaged: Source, workers: int):
    loader = loader_of(damaged, workers=workers)
    with pytest.raises(BadShard, match=damaged.shards[1].path):
        digests(loader, 0, 4)


def test_a_bad_shard_is_replaced_the_same_way_everywhere_and_counted(damaged: Source):
    def run(**changes) -> tuple[dict[str, str], float]:
        loader = loader_of(damaged, on_bad_shard="replace", **changes)
        samples = {}
        for step in loader.steps(0, 3):
            samples |= samples_of(step.batches)
        replaced = loader.counters["replaced"]
        loader.close()
        return samples, replaced

    whole, replaced = run()
    assert len(whole) == 48
    assert replaced == sum("~" in k for k in whole)
    assert damaged.shards[1].samples - 12 <= replaced <= damaged.shards[1].samples
    assert run(workers=2) == (whole, replaced)
    halves = [run(rank=r, world=2) for r in (0, 1)]
    assert halves[0][0] | halves[1][0] == whole
    assert halves[0][1] + halves[1][1] == replaced
    key = next(k for k in whole if "~" in k)
    assert samples_of([loader_of(damaged).replay([key])]) == {key: whole[key]}


def test_a_replacement_is_drawn_from_seed_epoch_dataset_and_sample(
    damaged: Source, write_toy: Callable[..., Source]
):
    # Samples 12 to 23 are in the bad shard. The replacement is word * 60 // 2**64 of Philox with the key (seed 3,
    # 3 << 32 | dataset) and the counter (0, 0, sample, epoch): the first such number outside of the bad shard.
    expected = {
        0: [57, 59, 55, 1, 10, 33, 54, 5, 57, 47, 53, 0],
        1: [35, 33, 42, 6, 26, 52, 7, 32, 36, 41, 3, 8],
    }
    keys = {f"{e}/toy/{12 + i}~{n}" for e, numbers in expected.items() for i, n in enumerate(numbers)}
    loader = loader_of(damaged, on_bad_shard="replace")
    batches = [b for step in loader.steps(0, 2 * 3) for b in step.batches]
    found = {k for b in batches for k in b.keys if "~" in k}
    assert {k.split("~")[0] for k in found} <= {k.split("~")[0] for k in keys}
    assert len(found) > 12
    assert found <= keys
    # As the second dataset of a mixture it draws others.
    loader = loader_of(write_toy(16), damaged, on_bad_shard="replace")
    keys = {k for step in loader.steps(0, 8) for b in step.batches for k in b.keys if "~" in k}
    assert keys == {"1/toy#1/14~42", "1/toy#1/22~51", "1/toy#1/23~51", "1/toy#1/17~28"}


def test_a_replacement_has_the_random_numbers_of_the_replaced_sample(
    damaged: Source, write_toy: Callable[..., Source]
):
    def noise(source: Source) -> dict[str, list[float]]:
        loader = loader_of(source, on_bad_shard="replace")
        batches = [b for step in loader.steps(0, 3) for b in step.batches]
        return {
            k.split("~")[0]: row.tolist()
            for b in batches
            for k, row in zip(b.keys, b.noise["s1"], strict=True)
        }

    assert noise(damaged) == noise(write_toy(60))


def test_no_sample_is_left_as_replacement(damaged: Source):
    only_bad = replace(damaged, shards=damaged.shards[1:2])
    with pytest.raises(BadShard, match="samples drawn in its place are bad too"):
        digests(loader_of(only_bad, on_bad_shard="replace"), 0, 1)


def with_repeated_dates(toy: Source) -> Source:
    """With more dates of a sensor than tiles have."""
    return replace(toy, spec=replace(toy.spec, sensors=(replace(toy.spec.sensors[1], num_dates=12),)))


def test_repeated_dates_are_counted(toy: Source):
    loader = loader_of(with_repeated_dates(toy))
    batches = next(loader.steps(0, 1)).batches
    assert sum(b.num_repeated_dates for b in batches) == loader.counters["filled"] > 16


def test_the_counters_of_a_step_do_not_include_later_ones(toy: Source):
    loader = loader_of(with_repeated_dates(toy))
    steps = list(loader.steps(0, 4))  # as a prefetch: later steps are loaded before the first is logged
    filled = itertools.accumulate(sum(b.num_repeated_dates for b in s.batches) for s in steps)
    assert [s.counters["filled"] for s in steps] == list(filled)
    assert steps[-1].counters == loader.counters
    assert steps[0].counters["filled"] < loader.counters["filled"]


def test_steps_of_each_dataset_are_counted_and_share_no_noise(write_toy: Callable[..., Source]):
    source = write_toy(16)
    loader = loader_of(source, source)
    steps = list(loader.steps(0, 4))
    assert [(s.step, s.dataset, s.dataset_step) for s in steps] == [
        (1, "toy#1", 1), (2, "toy#0", 1), (3, "toy#1", 2), (4, "toy#0", 2)
    ]  # fmt: skip
    noise = {k: row for s in steps for b in s.batches for k, row in zip(b.keys, b.noise["s1"], strict=True)}
    # Each epoch of 16 samples is one step: sample 5 came once per dataset and epoch.
    first, second = noise["0/toy#0/5"], noise["0/toy#1/5"]
    assert not torch.equal(first, second)
    assert not torch.equal(first, noise["1/toy#0/5"])
    # As the only dataset it has the noise of the first one.
    alone = next(loader_of(source).steps(0, 1)).batches
    assert torch.equal(
        first, next(b.noise["s1"][i] for b in alone for i, k in enumerate(b.keys) if k == "0/toy/5")
    )


def test_a_position_before_the_start_and_an_empty_micro_batch_are_refused(toy: Source):
    with pytest.raises(ValueError, match="-16 samples"):
        loader_of(toy).steps(-16, 8)
    with pytest.raises(SampleOrderError, match="micro_batch 0 does not divide the 16 samples"):
        loader_of(toy, micro_batch=0)


def test_keys_of_two_epochs_are_no_batch(toy: Source):
    with pytest.raises(ValueError, match="one dataset and one epoch"):
        loader_of(toy).replay(["0/toy/3", "1/toy/3"])
    with pytest.raises(ValueError, match="one dataset and one epoch"):
        loader_of(toy).replay([])


def test_samples_are_chosen_by_their_number_in_manifest_order(write_toy: Callable[..., Source]):
    source = write_toy(60)
    assert source.counts.tolist() == [12, 12, 12, 12, 12]
    part = source.select_samples([25, 0, 12, 11, 59])
    assert [s.path for s in part.shards] == [source.shards[i].path for i in (0, 1, 2, 4)]
    assert part.counts.tolist() == [2, 1, 1, 1]
    whole, chosen = ([t for b in EvalLoader(s, 5, crops=1) for t in b.tiles] for s in (source, part))
    assert chosen == [whole[i] for i in (0, 11, 12, 25, 59)]
