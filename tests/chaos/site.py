"""The place of an invocation: data, commands, environment, and undisturbed runs to compare with, each made once."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from maestro_scale.training.distributed import free_port
from tests.chaos.compare import check_success
from tests.chaos.objects import BUCKET, ObjectStore
from tests.chaos.processes import Start, wait_until_gone
from tests.testkit.runs import RECIPE, REPO

STEPS = 24
NUM_TILES = 40
SHARD_MB = 1
CACHE_GIB = 0.008  # less than the training split: shards are evicted and downloaded again
_CHANGES = (
    f"train.steps={STEPS}",
    "train.micro_batch=2",
    "checkpoint.every_steps=3",
    "optim.ema=0.9",
    "data.retry_s=60",
)
FINETUNING = (
    "train.steps=16",
    "evaluation.ema=0.9",
    "evaluation.validations=4",
    "evaluation.patience=0",
    "optim.ema=0",
)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: what it wrote, and how long it took."""

    folder: Path
    seconds: float


class Site:
    """Everything that rounds share. ``limit_s``: time limit of one start, after which it counts as a hang."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.limit_s = folder, limit_s
        self.num_reference_starts = 0
        self._references: dict[str, Reference] = {}
        (folder / "home").mkdir(parents=True)

    def close(self) -> None:
        """End the servers."""
        if "objects" in self.__dict__:
            self.objects.stop()

    @cached_property
    def raw(self) -> Path:
        """A synthetic raw dataset."""
        from maestro_scale import datasets

        datasets.synth("treesatai_ts", self.folder / "raw", NUM_TILES, 7)
        return self.folder / "raw"

    @cached_property
    def shards(self) -> Path:
        """The dataset in shards of about two tiles."""
        from maestro_scale import datasets
        from maestro_scale.shards.write.writer import write_shards

        for split in ("train", "val", "test"):
            raw = datasets.open_raw("treesatai_ts", self.raw, split)
            write_shards(raw, str(self.folder / "shards"), split, workers=1, shard_mb=SHARD_MB, seed=0)
        return self.folder / "shards"

    @cached_property
    def objects(self) -> ObjectStore:
        """An S3 server that has the shards."""
        store = ObjectStore()
        store.upload(self.shards, "shards")
        return store

    @property
    def shards_url(self) -> str:
        """The shards in the S3 server."""
        assert self.objects.port
        return f"s3://{BUCKET}/shards"

    def environment(self, folder: Path, **more: str) -> dict[str, str]:
        """Variables of the processes of a round; temporary files go to ``folder``/tmp."""
        temporary = folder / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "PYTEST_"))}
        return {
            **kept,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPO),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(temporary),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **more,
        }

    def recipe(self, folder: Path, shards: str | None = None, cache: Path | None = None) -> Path:
        """Write the recipe of a round: ``shards`` (default: the folder) through ``cache`` (default: in ``folder``)."""
        path = folder / "tiny.yaml"
        where = json.dumps(shards or str(self.shards)), json.dumps(str(cache or folder / "cache"))
        path.write_text(RECIPE.format(shards=where[0], cache=where[1]))
        return path

    def train(self, recipe: Path, run_dir: Path, ranks: int, *changes: str) -> list[str]:
        """The command of a training under DeepSpeed's launcher."""
        script = [f"--recipe={recipe}", f"--run-dir={run_dir}", "--set", *_CHANGES, *changes]
        return [*self._launch(ranks), "maestro_scale/train.py", *script]

    def evaluate(self, recipe: Path, out: Path, ranks: int, mode: str, *changes: str) -> list[str]:
        """The command of an evaluation of the undisturbed training's encoder under DeepSpeed's launcher."""
        model = self.training(2, 2).folder
        script = [f"--recipe={recipe}", f"--checkpoint={model}", f"--mode={mode}", f"--out={out}"]
        return [*self._launch(ranks), "maestro_scale/evaluate.py", *script, "--set", *_CHANGES, *changes]

    def command_line(self, *words: str) -> list[str]:
        """A command of ``maestro-scale``."""
        return [sys.executable, "-m", "maestro_scale.cli", *words]

    def training(self, ranks: int, stage: int) -> Reference:
        """An undisturbed training."""

        def command(folder: Path) -> list[str]:
            return self.train(
                self.recipe(folder), folder / "run", ranks, f"deepspeed.zero_optimization.stage={stage}"
            )

        made = self.reference(f"training-{ranks}-{stage}", command)
        return Reference(made.folder / "run", made.seconds)

    def evaluation(self, mode: str) -> Reference:
        """An undisturbed evaluation on two ranks."""

        def command(folder: Path) -> list[str]:
            return self.evaluate(self.recipe(folder), folder / "out", 2, mode, *FINETUNING)

        made = self.reference(f"evaluation-{mode}", command)
        return Reference(made.folder / "out", made.seconds)

    def reference(
        self, name: str, command: Callable[[Path], list[str]], env: dict[str, str] | None = None
    ) -> Reference:
        """The undisturbed run of a command, which gets its folder; made at the first call. RuntimeError if it fails."""
        if name not in self._references:
            folder = self.folder / "references" / name
            folder.mkdir(parents=True)
            words = command(folder)  # may make another reference first
            started = time.monotonic()
            start = Start(
                words,
                self.environment(folder, **(env or {})),
                folder / "log.txt",
                f"{os.getpid()}-reference-{name}/",
            )
            self.num_reference_starts += 1
            code = start.wait(self.limit_s)
            wait_until_gone(start.tag)
            if problems := check_success(code, start.output):
                raise RuntimeError(
                    f"the undisturbed run {name} failed: {problems[0].text}\n{start.output[-3000:]}"
                )
            self._references[name] = Reference(folder, time.monotonic() - started)
        return self._references[name]

    def _launch(self, ranks: int) -> list[str]:
        program = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
        return [program, f"--num_gpus={ranks}", f"--master_port={free_port()}"]
