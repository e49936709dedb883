"""Trainings in this process, by the real trainer: on shards, or on one mock batch without loading."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.data import MockStream
from benchmarks.gpu_sections.device import Device, Wait, WaitRecorder, profiled
from maestro_scale import datasets
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe, build_masking, build_model_config, resolve_spec
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.assembly import RunContext, TrainingParts, assemble, seed_everything
from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.checkpoint.folder import newest
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.engine import Engine
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.objectives import PretrainObjective
from maestro_scale.training.pretrain import pretrain
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.watchdog import monitored

_HANG_S = 3600.0  # sections have their own time limit
_NUM_STEPS = 10**6  # of a mock training, which a hook ends


def run_on_shards(
    bench: Bench, recipe: Recipe, name: str, hooks: Sequence[Hook] = (), stop: StopRequest | None = None
) -> Path:
    """Pretrain as ``train.py`` does, or resume; returns the run directory ``name``."""
    run_dir = bench.work / "runs" / name
    engines: list[Engine] = []

    def build_hooks(engine: Engine) -> Sequence[Hook]:
        engines.append(engine)
        return hooks

    with monitored(bench.world, _HANG_S, run_dir) as watchdog:
        pretrain(
            recipe,
            run_dir,
            bench.world,
            (),
            watchdog,
            stop or StopRequest(),
            evaluation=lambda *_: build_hooks,
        )
    engines.pop().close()
    bench.free()
    return run_dir


def run_on_mock_batch(bench: Bench, recipe: Recipe, name: str, hooks: Sequence[Hook]) -> None:
    """The steps of a recipe of one dataset without its data, until a hook has finished."""
    run_dir = bench.work / "runs" / name
    shutil.rmtree(run_dir, ignore_errors=True)
    (entry,) = recipe.data.mixture
    spec = resolve_spec(datasets.spec(entry.dataset), entry)
    source = Source(spec, (), cast(Any, None))  # no shards, so no store
    config = build_model_config(recipe, [spec])
    world = bench.world
    seed_everything(recipe.seed)
    pin = bench.device.is_gpu
    num_micro_batches = recipe.num_micro_batches(world.size)
    micro_batch = cast(int, recipe.train.micro_batch)  # never auto here
    stream = MockStream(source, config.dataset, micro_batch, num_micro_batches, pin)
    parts = TrainingParts(
        network=build_network(bench, recipe, config),
        objective=PretrainObjective(
            configs={config.dataset: config},
            sources={config.dataset: source},
            masking=build_masking(recipe),
        ),
        stream=cast(TrainLoader, stream),  # it has the methods that a trainer calls
        num_steps=_NUM_STEPS,
        micro_batch=micro_batch,
        checkpoints=Checkpoints(run_dir, world, Retention(1, 0)),
        identity={},
        build_hooks=lambda engine, ema: hooks,
        spike=recipe.train.spike,
    )
    with monitored(world, _HANG_S, run_dir) as watchdog:
        context = RunContext(recipe, run_dir, world, (), watchdog, StopRequest())
        trainer, position = assemble(context, parts)
        trainer.run(position)
    trainer.engine.close()
    del trainer, parts, context
    bench.free()


def build_network(bench: Bench, recipe: Recipe, config: ModelConfig) -> Maestro:
    """The model as ``pretrain`` builds it for one micro-batch per step."""
    mode = recipe.model.compile
    # A rehearsal traces forward and backward, and generates no code, which would take minutes on a CPU.
    backend = "aot_eager" if bench.rehearse else "inductor"
    cuda_graphs = mode == "step" and bench.device.is_gpu and not bench.rehearse
    return new_model(config, recipe.seed).compile_training(mode, cuda_graphs, backend)


def new_model(config: ModelConfig, seed: int) -> Maestro:
    """``Maestro(config).initialise(seed)``, without the 8 s in which torch initialises a large one before."""
    with torch.device("meta"):
        model = Maestro(config)
    return model.to_empty(device="cpu").initialise(seed)


def losses(run_dir: Path) -> list[float]:
    """The loss of each step in metrics.jsonl."""
    return [line["loss"] for line in metrics(run_dir)]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def saved_state(run_dir: Path) -> dict[str, bytes]:
    """{file: content} of the weights and moments in the newest checkpoint."""
    state = newest(run_dir) / "state"
    return {p.relative_to(state).as_posix(): p.read_bytes() for p in sorted(state.rglob("*.safetensors"))}


class StopAfter(Hook):
    """Ends a mock training after ``num_steps`` steps."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps, self._done = num_steps, 0

    @property
    def finished(self) -> bool:
        """Whether the last step was made."""
        return self._done >= self._num_steps

    def after_step(self, step: FinishedStep) -> bool:
        """Count the step."""
        self._done += 1
        return False


class RequestStop(Hook):
    """Requests a stop with a checkpoint, as a signal would, so that it takes effect in step ``step``."""

    def __init__(self, stop: StopRequest, step: int) -> None:
        self._stop, self._step = stop, step

    def after_step(self, step: FinishedStep) -> bool:
        """Request it one step before."""
        if step.position.step == self._step - 1:
            self._stop.reason = "the benchmark"
        return False


class StepClock(Hook):
    """Seconds per step in ``repeats`` windows of ``length`` steps, after ``warmup`` steps.

    The device is waited for at the border of a window only: within it the host can run ahead, as in a training. A
    window ends early, and no other begins, at ``ends_at`` (time.time()). ``peak_bytes`` and ``reserved_bytes``: largest
    since the end of the warm-up; None on a CPU.
    """

    def __init__(self, device: Device, warmup: int, repeats: int, length: int, ends_at: float) -> None:
        self._device, self._warmup, self._repeats = device, warmup, repeats
        self._length, self._ends_at = length, ends_at
        self._num_steps, self._in_window, self._started = 0, 0, 0.0
        self.warmup_s = 0.0
        self.step_s: list[float] = []
        self.wait_s: list[float] = []
        self.peak_bytes: int | None = None
        self.reserved_bytes: int | None = None
        self._wait_s = 0.0
        self._began = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether all windows are measured, or the time is over."""
        return len(self.step_s) >= self._repeats or (bool(self.step_s) and time.time() > self._ends_at)

    def on_start(self, position: Any, num_steps: int) -> None:
        """The first step, which compiles, begins."""
        self._began = time.perf_counter()

    def after_step(self, step: FinishedStep) -> bool:
        """Open and close windows."""
        self._num_steps += 1
        if self._num_steps < self._warmup:
            return False
        if self._num_steps == self._warmup:
            self._device.synchronize()
            self._device.start_peak()
            self.warmup_s = time.perf_counter() - self._began
            self._open()
            return False
        self._in_window += 1
        self._wait_s += step.wait_s
        if self._in_window >= self._length or time.time() > self._ends_at:
            self._device.synchronize()
            self.step_s.append((time.perf_counter() - self._started) / self._in_window)
            self.wait_s.append(self._wait_s / self._in_window)
            self.peak_bytes, self.reserved_bytes = self._device.peak_bytes(), self._device.reserved_bytes()
            self._open()
        return False

    def _open(self) -> None:
        self._in_window, self._wait_s, self._started = 0, 0.0, time.perf_counter()


class WaitHook(Hook):
    """Records the host synchronisations of one step: from the end of step ``after`` to the end of the next one."""

    def __init__(self, device: Device, after: int) -> None:
        self._recorder, self._after, self._num_steps = WaitRecorder(device), after, 0
        self.waits: list[Wait] = []

    @property
    def finished(self) -> bool:
        """Whether the step was recorded."""
        return self._num_steps > self._after

    def after_step(self, step: FinishedStep) -> bool:
        """Start or end the recording."""
        self._num_steps += 1
        if self._num_steps == self._after:
            self._recorder.start()
        elif self._num_steps == self._after + 1:
            self.waits = self._recorder.stop()
        return False


class ProfileHook(Hook):
    """Profiles one step: from the end of step ``after`` to the end of the next one."""

    def __init__(self, device: Device, after: int) -> None:
        self._device, self._after, self._num_steps = device, after, 0
        self._block: Any = None
        self._result: list[Any] = []

    @property
    def finished(self) -> bool:
        """Whether the step was profiled."""
        return self._num_steps > self._after

    @property
    def profile(self) -> Any:
        """The :class:`~benchmarks.gpu_sections.device.KernelProfile` of the step."""
        return self._result[0]

    def after_step(self, step: FinishedStep) -> bool:
        """Start or end the profile."""
        self._num_steps += 1
        if self._num_steps == self._after:
            self._block = profiled(self._device)
            self._result = self._block.__enter__()
        elif self._num_steps == self._after + 1:
            self._block.__exit__(None, None, None)
        return False
