"""The trainer alone, without an engine."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from testkit.streams import META, FakeDevice, steps_of

from maestro_scale.stream.device_copy import DeviceCopier
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.hooks.hook import Hook
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.trainer import Trainer, TrainSchedule


def trainer_of(tmp_path, **changes) -> Trainer:
    parts = {
        "world": SimpleNamespace(is_main=True, device=torch.device("cpu")),
        "engine": None,
        "state": SimpleNamespace(ema=None),
        "objective": None,
        "stream": SimpleNamespace(steps=lambda *args: iter(()), close=lambda: None),
        "schedule": TrainSchedule(num_steps=2, global_batch=4, checkpoint_every=1),
        "checkpoints": SimpleNamespace(close=lambda alive: None),
        "identity": {},
        "hooks": [],
        "stop": StopRequest(tmp_path),
        "watchdog": SimpleNamespace(note=lambda *args: None),
    }
    return Trainer(**(parts | changes))


def test_a_training_that_is_done_leaves_no_stop_file(tmp_path):
    (tmp_path / "STOP").touch()
    assert trainer_of(tmp_path).run(Position(step=2)).reason == "done"
    assert not (tmp_path / "STOP").exists()


def four_steps(tmp_path, events: list[str], steps, **changes) -> Trainer:
    """A trainer of four steps, without a model, that notes what it loads and computes in ``events``."""

    def loaded():
        for step in steps:
            events.append(f"load {step.step}")
            yield step

    def step(number, batches, inputs, num_terms, while_computing):
        events.append(f"compute {number + 1}")
        while_computing()
        events.append(f"end {number + 1}")
        return SimpleNamespace(skipped=None)

    none = SimpleNamespace(close=lambda alive: None, pending=False, busy=False, begin=lambda *args: None)
    return trainer_of(
        tmp_path,
        world=SimpleNamespace(
            is_main=True, device=META, sum_with_flags=lambda values, flags: (values, torch.zeros(3))
        ),
        engine=SimpleNamespace(step=step, guard=SimpleNamespace(state_dict=dict)),
        objective=SimpleNamespace(inputs=lambda host, batch: batch, num_terms=lambda *args: torch.ones(1)),
        stream=SimpleNamespace(steps=lambda *args: loaded(), close=lambda: None),
        schedule=TrainSchedule(num_steps=4, global_batch=4, checkpoint_every=1),
        checkpoints=none,
        **changes,
    )


def test_two_steps_of_batches_are_on_the_device_at_most_and_the_next_one_is_fetched_within_the_step(
    tmp_path, monkeypatch
):
    FakeDevice().install(monkeypatch)
    blocks, alive, events = [], [], []
    start = DeviceCopier.start

    def started(copier, batches):
        pending = start(copier, batches)
        blocks.extend(weakref.ref(b.block) for b in pending.batches)
        alive.append(sum(block() is not None for block in blocks))
        return pending

    monkeypatch.setattr(DeviceCopier, "start", started)

    trainer = four_steps(tmp_path, events, steps_of(4))
    assert trainer.run(Position()).position == Position(samples=16, step=4)
    assert alive == [2, 4, 4, 4]  # two micro-batches per step
    assert events == [
        *("load 1", "compute 1", "load 2", "end 1", "compute 2", "load 3", "end 2"),
        *("compute 3", "load 4", "end 3", "compute 4", "end 4"),
    ]


def test_a_step_is_finished_before_an_error_of_the_next_steps_data_is_raised(tmp_path, monkeypatch):
    FakeDevice().install(monkeypatch)
    events: list[str] = []
    hook = Hook()
    hook.after_step = lambda step: events.append(f"hooks {step.position.step}")
    trainer = four_steps(tmp_path, events, steps_of(2, OSError("no shard")), hooks=[hook])
    with pytest.raises(OSError, match="no shard"):
        trainer.run(Position())
    assert events == [
        *("load 1", "compute 1", "load 2", "end 1", "hooks 1"),
        *("compute 2", "end 2", "hooks 2"),
    ]
