"""Real evaluations on the simulated device: frozen encoders, finetuning, maps and embeddings. Run as a script: FOLDER.

Writes FOLDER/evaluation.json: per run its records and its scores.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from testkit.simulated import accelerator, inject
from testkit.simulated.tensor import DEVICE, host_groups, recorder, simulation

from tests.device.training import Quiet, join

RECIPE = """
name: evaluation
data:
  mixture: [{{dataset: {dataset}, shards: {shards}, split: train{sensors}}}]
  cache_dir: {cache}
  workers: 0
  lanes: 2
optim: {{base_lr: 1.0e-3}}
train: {{steps: 6, global_batch: 8, micro_batch: 4, precision: fp32, log_every: 3}}
deepspeed: {{zero_optimization: {{stage: 1}}}}
checkpoint: {{every_steps: 4}}
evaluation: {{validations: 2}}
tracking: {{enabled: false}}
"""
SENSORS = ", sensors: {aerial: {image_size: 60, patch: 20}, s2: {num_dates: 4, patch: 3}, s1_asc: null, s1_des: null}"


class Evaluations:
    """All evaluations of one dataset."""

    def __init__(self, folder: Path, dataset: str, shards: Path, sensors: str = "") -> None:
        from maestro_scale.evaluation.benchmark import Benchmark
        from maestro_scale.recipe import load_recipe, resolve_spec
        from maestro_scale.shards.format.manifest import Manifest

        self.folder = folder / dataset
        self.folder.mkdir()
        path = self.folder / "recipe.yaml"
        quoted = {"shards": json.dumps(str(shards)), "cache": json.dumps(str(folder / "cache"))}
        path.write_text(RECIPE.format(dataset=dataset, sensors=sensors, **quoted))
        self.recipe = load_recipe(str(path), [])
        entry = self.recipe.data.mixture[0]
        self.spec = resolve_spec(Manifest.load(entry.shards).spec, entry)
        self.shards = str(shards)
        self.benchmark = lambda name: Benchmark(
            self.spec, self.shards, folder / "cache", self.folder / name / "features", 2**31
        )

    def encoder(self) -> Any:
        from testkit.models import TINY

        from maestro_scale.model.config import ModelConfig
        from maestro_scale.model.maestro import Maestro

        spec = self.spec
        config = ModelConfig(
            sensors=spec.sensors,
            size=TINY,
            pos_grid=spec.pos_grid,
            inter_depth=1,
            ref_sensor=spec.ref_sensor,
            dataset=spec.name,
        )
        return Maestro(config).initialise(0)

    def frozen(self, device: torch.device, modes: list[str], maps: bool, precision: str) -> dict[str, float]:
        """Scores of a frozen encoder by mode."""
        from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen

        name = f"{device.type}-{'-'.join(modes)}"
        results = evaluate_frozen(
            self.encoder(),
            self.benchmark(name),
            modes,
            world=_world(device),
            precision=precision,
            maps_dirs={mode: self.folder / name / "maps" / mode for mode in modes} if maps else None,
        )
        return {r.mode: r.value for r in results}

    def finetune(self, device: torch.device, maps: bool) -> dict[str, float]:
        """The score of a finetuning."""
        from maestro_scale.evaluation.benchmark import Provenance
        from maestro_scale.evaluation.finetune.finetune import finetune

        run_dir = self.folder / f"{device.type}-finetune"
        run_dir.mkdir()
        result = finetune(
            self.encoder(),
            self.benchmark(run_dir.name),
            self.recipe,
            "finetune",
            run_dir,
            _world(device),
            Provenance(),
            run_dir / "maps" if maps else None,
        )
        assert result is not None
        return {"finetune": result.value}

    def run_all(self, device: torch.device, maps: bool) -> Iterator[tuple[str, dict[str, float]]]:
        """(name, scores) of each evaluation; the records are those of the last one."""
        for modes, precision in ((["knn", "probe"], "bf16"), (["attentive"], "fp32")):
            recorder.records.clear()
            with recorder.phase("encode"):
                yield modes[0], self.frozen(device, modes, maps, precision)
        recorder.records.clear()
        yield "finetune", self.finetune(device, maps)
        recorder.records.clear()
        with recorder.phase("encode"):
            yield "embed", self.embed(device, device.type)

    def embed(self, device: torch.device, name: str) -> dict[str, float]:
        """The number of rows written."""
        from maestro_scale.evaluation.embedding import EmbeddingWriter
        from maestro_scale.shards.format.manifest import Manifest
        from maestro_scale.shards.read.store import Store

        model = self.encoder().to(device).eval()
        store = Store(self.shards, self.folder.parent / "cache", 2**31)
        rows = {}
        for what in ("vector", "tokens"):
            writer = EmbeddingWriter(model, store, Manifest.load(self.shards), what, batch_size=4)
            rows[what] = writer.write(self.folder / name / what, "train")
        return rows


def _world(device: torch.device) -> Any:
    from maestro_scale.training.distributed import World

    return World(rank=0, size=1, local_rank=0, device=device, control=host_groups[0])


def quick() -> None:
    """Fewer steps of the probes."""
    from maestro_scale.evaluation.finetune import finetune
    from maestro_scale.evaluation.probes import lr_grid

    lr_grid.EPOCHS, lr_grid.MIN_STEPS = 1, 3
    finetune.monitored = lambda *args: _Monitored()  # no threads of the watchdog


class _Monitored:
    def __enter__(self) -> Quiet:
        return Quiet()

    def __exit__(self, *error: object) -> None:
        pass


def write_fields(folder: Path) -> Path:
    """Shards of a small segmentation benchmark."""
    from maestro_scale.shards.write.writer import Writer
    from tests.evaluation.conftest import FIELDS, SPLITS, field_tile

    first = 0
    for split, count in SPLITS.items():
        with Writer(str(folder / "fields-shards"), FIELDS, split) as writer:
            for number in range(first, first + count):
                writer.add(field_tile(number))
        first += count
    return folder / "fields-shards"


# A mistake in DeviceCopier.finish.
_NO_RECORD_STREAM = """
if copies.copied is not None:
    compute_stream(self._device).wait_event(copies.copied)
    return copies.batches
"""


def main(folder: Path, shards: Path) -> None:
    join()
    from maestro_scale.stream.device_copy import DeviceCopier

    quick()
    found: dict[str, Any] = {}
    datasets = {
        "fields": (Evaluations(folder, "fields", write_fields(folder)), True),
        "treesatai_ts": (Evaluations(folder, "treesatai_ts", shards, SENSORS), False),
    }
    with simulation():
        for dataset, (evaluations, maps) in datasets.items():
            for device in (DEVICE, torch.device("cpu")):
                accelerator.use(device)
                for name, scores in evaluations.run_all(device, maps):
                    one = found.setdefault(f"{dataset} {name}", {})
                    one[f"{device.type} scores"] = scores
                    if device == DEVICE:
                        one["records"] = recorder.dump()
        evaluations = datasets["fields"][0]
        with inject.statement(DeviceCopier.finish, _NO_RECORD_STREAM), recorder.phase("encode"):
            recorder.records.clear()
            evaluations.embed(DEVICE, "mistake")
            found["no record_stream"] = {"records": recorder.dump()}
    (folder / "evaluation.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads would abort the interpreter's shutdown


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
