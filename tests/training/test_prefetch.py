"""The next step's batches are copied on a side stream while the current step is computed."""

from __future__ import annotations

import pytest
import torch
from testkit.streams import META, Copies, FakeDevice, steps_of

from maestro_scale.training.prefetch import StepPrefetcher


def test_steps_come_in_order_each_once_on_the_cpu_without_a_copy():
    prefetcher = StepPrefetcher(steps_of(3), torch.device("cpu"))
    for number in (1, 2, 3):
        step, batches = prefetcher.take()
        assert step.step == number
        assert all(b is d for b, d in zip(step.batches, batches, strict=True))
        prefetcher.fetch()
        prefetcher.fetch()  # a second call does not skip a step
    with pytest.raises(StopIteration):
        prefetcher.take()


def test_an_error_of_the_loader_is_raised_when_its_step_is_due():
    prefetcher = StepPrefetcher(steps_of(1, error=OSError("no shard")), torch.device("cpu"))
    step, _ = prefetcher.take()
    prefetcher.fetch()
    assert step.step == 1  # and its result can be written
    with pytest.raises(OSError, match="no shard"):
        prefetcher.take()


def test_the_next_step_is_loaded_after_the_kernels_of_this_one_are_queued_and_copied_beside_them(monkeypatch):
    device = FakeDevice().install(monkeypatch)
    prefetcher = StepPrefetcher(steps_of(2), META)
    with Copies(device) as copies:
        prefetcher.take()
        device.compute("step 1")
        prefetcher.fetch()
        device.compute("end of step 1")
        prefetcher.take()
        device.compute("step 2")
    assert device.log == [
        *[("side 0", "copy")] * 2,
        ("compute", "waits for 2"),
        ("compute", "step 1"),
        *[("side 0", "copy")] * 2,  # queued before the end of step 1, which does not wait for them
        ("compute", "end of step 1"),
        ("compute", "waits for 6"),
        ("compute", "step 2"),
    ]
    # One copy per micro-batch: uint16 (4, 2, 3) from 0, float32 (4, 5) from 64, int16 (4, 3) from 192.
    assert copies.sizes == [64 + 128 + 24] * 4
    # The allocator may not reuse a block that queued kernels read: that of each of the four batches.
    assert device.recorded == [216] * 4


def test_only_time_in_which_the_device_had_no_work_counts_as_waiting(monkeypatch):
    device, now = FakeDevice().install(monkeypatch), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    busy = iter((False, True, False))

    def slow_steps():
        for step in steps_of(3):
            now[0] += 2.0
            if not next(busy):
                device.run()
            yield step

    prefetcher = StepPrefetcher(slow_steps(), META)
    waited = []
    for _ in range(3):
        device.compute("step")
        prefetcher.take()
        waited.append(prefetcher.waited_s)
    assert waited == [2.0, 2.0, 4.0]  # during the second one the device was busy
