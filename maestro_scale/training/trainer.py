"""The training loop, the same for every objective: ``_train`` and ``_step`` are the sequence of operations of a step.

``maestro_scale/training/assembly.py`` builds a Trainer from a recipe; ``pretrain.py`` and
``evaluation/finetune/finetune.py`` choose its objective and hooks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from maestro_scale.stream.loader import TrainLoader
from maestro_scale.training.checkpoint.checkpoints import Checkpoints
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.checkpoint.state import TrainState
from maestro_scale.training.distributed import World
from maestro_scale.training.engine import Engine
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.objectives import Objective
from maestro_scale.training.prefetch import StepPrefetcher
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.watchdog import Watchdog


@dataclass(frozen=True)
class TrainSchedule:
    """Length and checkpoint intervals. ``checkpoint_s``: most seconds between checkpoints, 0: no limit."""

    num_steps: int
    global_batch: int
    checkpoint_every: int
    checkpoint_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a training ended: ``done``, or ``stopped`` by ``why``."""

    reason: str
    position: Position
    why: str = ""


@dataclass
class Trainer:
    """A training on one rank; all ranks run the same calls.

    ``identity``: what must not change between a checkpoint and its resumption. ``hooks``: see ``hooks/hook.py``.
    """

    world: World
    engine: Engine
    state: TrainState
    objective: Objective
    stream: TrainLoader
    schedule: TrainSchedule
    checkpoints: Checkpoints
    identity: dict[str, Any]
    hooks: list[Hook]
    stop: StopRequest
    watchdog: Watchdog

    def resume(self) -> Position:
        """Load the newest checkpoint, if there is one; returns the position."""
        resumed = self.checkpoints.resume(self.state, self.identity)
        if resumed.guard is not None:
            self.engine.guard.load_state_dict(resumed.guard)
        for hook in self.hooks:
            if hook.name in resumed.hooks:
                hook.load_state_dict(resumed.hooks[hook.name])
        return resumed.position

    def run(self, position: Position) -> Outcome:
        """Train from ``position``; end the stream and the hooks in any case.

        Raises GuardError after too many skipped steps in a row, and the errors of the stream and the checkpoints.
        """
        reason = "failed"
        try:
            for hook in self.hooks:
                hook.on_start(position, self.schedule.num_steps)
            outcome = self._train(position)
            reason = outcome.reason
            if self.world.is_main:
                # Also if the last step came first: else a start with more steps would stop at once.
                self.stop.clear_file()
            return outcome
        finally:
            self.watchdog.note(position.step, "ending")
            self.stream.close()
            for hook in self.hooks:
                hook.on_end(reason)

    def _train(self, position: Position) -> Outcome:
        """Run the remaining steps. The last one ends with a committed checkpoint."""
        schedule, checkpoints = self.schedule, self.checkpoints
        checkpoints.on_commit = self._committed
        steps = StepPrefetcher(self.stream.steps(position.samples, schedule.num_steps), self.world.device)
        saved_at = time.monotonic()
        while position.step < schedule.num_steps and not self._finished:
            overdue = 0 < schedule.checkpoint_s < time.monotonic() - saved_at
            step, flags = self._step(steps, position, overdue)
            position = step.position
            # A list, not a generator in any(): every hook must be called, even if an earlier one returns True.
            due = [hook.after_step(step) for hook in self.hooks]
            stopping, overdue, writing = flags.tolist()
            self.watchdog.note(position.step, "writing")
            if checkpoints.pending and not writing:
                checkpoints.advance()
            every = position.step % schedule.checkpoint_every == 0
            if step.is_last or stopping or overdue or every or any(due):
                hook_states = {h.name: state for h in self.hooks if (state := h.state_dict())}
                guard = self.engine.guard.state_dict()
                checkpoints.begin(self.state, position, self.identity, guard, hook_states)
                saved_at = time.monotonic()
            is_last = step.is_last
            # Its batches are freed before the next step prefetches: at most two steps' batches are on the device.
            del step
            if stopping and not is_last and not self._finished:
                checkpoints.close(partial(self.watchdog.note, position.step, "writing"))
                return Outcome("stopped", position, self.stop.reason or "another rank's request")
        checkpoints.close(partial(self.watchdog.note, position.step, "writing"))
        return Outcome("done", position)

    def _step(self, steps: StepPrefetcher, position: Position, overdue: bool) -> tuple[FinishedStep, Tensor]:
        """One optimizer step, and the flags (stop requested, checkpoint overdue, checkpoint being written), (3,) bool:
        each set where it is on any rank."""
        self.watchdog.note(position.step + 1, "waiting for data")
        waited_s = steps.waited_s
        data, batches = steps.take()

        self.watchdog.note(position.step + 1, "computing")
        inputs = [self.objective.inputs(b, d) for b, d in zip(data.batches, batches, strict=True)]
        # What all ranks must agree on travels with the counts, in one collective per step. The flags are read only
        # after the step, when the device has been waited for anyway.
        flags = [self.stop.requested(), overdue and self.world.is_main, self.checkpoints.busy]
        num_terms, raised = self.world.sum_with_flags(self.objective.num_terms(data.dataset, inputs), flags)
        fetch_next = partial(self._fetch, steps, position.step + 1)
        result = self.engine.step(position.step, batches, inputs, num_terms, fetch_next)
        # A skipped step has changed no weights, so it is left out of an average of all steps. Of an average of epochs,
        # every epoch counts, also one whose last step was skipped.
        ema = self.state.ema
        if ema is not None and (result.skipped is None or ema.every > 1):
            ema.update(position.step + 1)
        position = Position(
            samples=position.samples + self.schedule.global_batch,
            step=position.step + 1,
            skipped_steps=position.skipped_steps + (result.skipped is not None),
        )
        is_last = position.step == self.schedule.num_steps
        wait_s = steps.waited_s - waited_s
        return FinishedStep(position, data, batches, inputs, num_terms, result, wait_s, is_last), raised

    def _fetch(self, steps: StepPrefetcher, step: int) -> None:
        """Fetch the data of the next step while the device computes ``step``."""
        # Noted as waiting at ``step``, not at the next one: the ranks that wait for this one in a collective are still
        # at ``step``, and the watchdog names the rank that is furthest behind.
        self.watchdog.note(step, "waiting for data")
        steps.fetch()
        self.watchdog.note(step, "computing")

    @property
    def _finished(self) -> bool:
        return any(hook.finished for hook in self.hooks)

    def _committed(self, position: Position) -> None:
        for hook in self.hooks:
            hook.after_commit(position)
