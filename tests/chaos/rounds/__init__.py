"""The rounds by kind."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.round import Round
from tests.chaos.rounds import evaluation, shards, tracking, training

ROUNDS: dict[str, Callable[[Round], None]] = {
    "kill": training.kill,
    "s3": training.s3,
    "elastic": training.elastic,
    "disk": training.disk,
    "stop": training.stop,
    "clock": training.clock,
    "mlflow": tracking.mlflow,
    "knn": evaluation.knn,
    "finetune": evaluation.finetune,
    "embed": evaluation.embed,
    "shard": shards.local,
    "shard-s3": shards.remote,
}
"""Function of each kind of round."""
