"""Names the phases of the project's training and evaluation in the records, by its public functions."""

from __future__ import annotations

from importlib import import_module

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
    ("training.checkpoint.checkpoints", "Checkpoints", "commit", "checkpoint"),
    ("training.checkpoint.checkpoints", "Checkpoints", "close", "checkpoint"),
    ("evaluation.in_loop", "InLoopEvaluationHook", "after_step", "in-loop evaluation"),
    ("evaluation.finetune.validation", "ValidationHook", "after_step", "validation"),
)
STEP = ("copy", "masks", "forward", "backward", "optimizer", "ema", "step", "training")
"""Phases of a step that makes no log line, picture, checkpoint or evaluation."""


def name_phases(recorder: Recorder) -> None:
    """Wrap the functions, and DeepSpeed's backward and step, once per process."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    for module_name, class_name, function, phase in _FUNCTIONS:
        module = import_module(_PACKAGE + module_name)
        owner = getattr(module, class_name) if class_name else module
        recorder.wrap(owner, function, phase, mark=function == "step")
    recorder.wrap(DeepSpeedEngine, "forward", "forward")
    recorder.wrap(DeepSpeedEngine, "backward", "backward")
    recorder.wrap(DeepSpeedEngine, "step", "optimizer")
