"""Names the phases of the project's training and evaluation in the records, by its public functions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from testkit.simulated.recorder import Recorder

_PACKAGE = "maestro_scale."
# (module, class or "", function, phase). What a step does outside of them is in phase "step".
_FUNCTIONS = (
    ("training.assembly", "", "assemble", "setup"),
    ("training.warmup", "", "warm_up", "warm-up"),
    ("training.trainer", "Trainer", "resume", "resume"),
    ("training.trainer", "Trainer", "run", "training"),
    ("training.engine", "Engine", "step", "step"),
    ("stream.batch", "Batch", "to", "copy"),
    ("training.objectives", "PretrainObjective", "inputs", "masks"),
    ("training.objectives", "PretrainObjective", "num_terms", "masks"),
    ("evaluation.finetune.objective", "FinetuneObjective", "inputs", "masks"),
    ("evaluation.finetune.objective", "FinetuneObjective", "num_terms", "masks"),
    ("model.maestro", "Maestro", "forward", "forward"),
    ("evaluation.finetune.predictor", "Predictor", "forward", "forward"),
    ("training.ema", "WeightEMA", "update", "ema"),
    ("training.hooks.log", "LogHook", "after_step", "log"),
    ("training.hooks.pictures", "PicturesHook", "after_step", "pictures"),
    ("training.checkpoint.checkpoints", "Checkpoints", "begin", "checkpoint"),
    ("training.checkpoint.checkpoints", "Checkpoints", "advance", "checkpoint"),
    ("training.checkpoint.checkpoints", "Checkpoints", "finish", "checkpoint"),
    ("training.checkpoint.checkpoints", "Checkpoints", "close", "checkpoint"),
    ("evaluation.in_loop", "InLoopEvaluationHook", "after_step", "in-loop evaluation"),
    ("evaluation.finetune.validation", "ValidationHook", "after_step", "validation"),
)
STEP = ("copy", "masks", "forward", "backward", "optimizer", "ema", "step", "training")
"""Phases of a step that makes no log line, picture, checkpoint or evaluation."""


def _dataset(engine: Any, step: int, batches: Sequence[Any], *rest: Any) -> str:
    """The dataset of a step, from the arguments of ``Engine.step``."""
    return batches[0].dataset


def name_phases(recorder: Recorder) -> None:
    """Wrap the functions, and DeepSpeed's backward and step, once per process."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    recorder.open_phases = {"setup", *STEP}
    for module_name, class_name, name, phase in _FUNCTIONS:
        module = import_module(_PACKAGE + module_name)
        owner = getattr(module, class_name) if class_name else module
        function = getattr(owner, name)
        wrapped = recorder.wrapped(function, phase, _dataset if phase == "step" else None)
        setattr(owner, name, wrapped)
        for other in [m for key, m in sys.modules.items() if key.startswith(_PACKAGE)]:
            if vars(other).get(name) is function:  # it has been imported there
                setattr(other, name, wrapped)
    for name, phase in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer")):
        setattr(DeepSpeedEngine, name, recorder.wrapped(getattr(DeepSpeedEngine, name), phase))
