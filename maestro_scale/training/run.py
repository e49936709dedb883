"""Runs a pretraining on the ranks of a launcher: process group, watchdog, trainer, and outcome file."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from maestro_scale.recipe import Recipe
from maestro_scale.training.distributed import destroy_process_group, init_distributed
from maestro_scale.training.observer import Observer
from maestro_scale.training.pretrain import EvaluationHooks, no_evaluation, pretrain
from maestro_scale.training.run_dir import write_outcome
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.watchdog import monitored


def run_pretraining(
    recipe: Recipe,
    run_dir: Path,
    stop: StopRequest,
    fresh: bool = False,
    observers_for: Callable[[Recipe], Sequence[Observer]] = lambda recipe: (),
    evaluation: EvaluationHooks = no_evaluation,
    closing_message: Callable[[Path, str], str] = lambda run_dir, reason: "",
) -> None:
    """Run or resume a pretraining; every rank calls it.

    Functions of higher layers are passed in: ``observers_for`` (terminal, MLflow), ``evaluation`` and
    ``closing_message`` (from the run directory and ``done`` or ``stopped``). Raises MaestroError.
    """
    timeout_s = recipe.train.hang_timeout_s
    # Longer than the watchdog's timeout: the watchdog names the rank that hangs, a failed collective does not.
    world = init_distributed(max(600.0, 2 * timeout_s), recipe.train.device, lambda: stop.reason)
    with monitored(world, timeout_s, run_dir) as watchdog:
        observers = observers_for(recipe) if world.is_main else ()
        outcome = pretrain(recipe, run_dir, world, observers, watchdog, stop, fresh, evaluation)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the run has ended: a repeated signal must not kill it now
    if world.is_main:
        position = outcome.position
        write_outcome(run_dir, outcome.reason, outcome.why, position.step)
        if outcome.reason == "stopped":
            print(f"stopped by {outcome.why} after step {position.step}, resume with the same command")
        else:
            print(f"done: {position.step} steps, {position.samples} samples, in {run_dir}")
        if message := closing_message(run_dir, outcome.reason):
            print(message)
    destroy_process_group()
