"""The trainer alone, without an engine."""

from types import SimpleNamespace

from maestro_scale.training.checkpoint.checkpoints import Position
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.trainer import Trainer, TrainSchedule


def test_a_training_that_is_done_leaves_no_stop_file(tmp_path):
    (tmp_path / "STOP").touch()
    trainer = Trainer(
        world=SimpleNamespace(is_main=True),
        engine=None,
        state=None,
        objective=None,
        stream=SimpleNamespace(steps=lambda *args: iter(()), close=lambda: None),
        schedule=TrainSchedule(num_steps=2, global_batch=4, checkpoint_every=1),
        checkpoints=SimpleNamespace(close=lambda alive: None),
        identity={},
        hooks=[],
        stop=StopRequest(tmp_path),
        watchdog=SimpleNamespace(note=lambda *args: None),
    )
    assert trainer.run(Position(step=2)).reason == "done"
    assert not (tmp_path / "STOP").exists()
