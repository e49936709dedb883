"""Evaluation on the simulated device: encoding, classifiers, labels of a finetuning. Run as a script; prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from testkit.simulated.recorder import COPY, MARK, MIX, RACE, SYNC
from testkit.simulated.tensor import DEVICE, recorder, simulation

from maestro_scale.evaluation.features.labelled_features import LabelledFeatures
from maestro_scale.evaluation.features.on_device import map_on_device
from maestro_scale.evaluation.finetune.objective import FinetuneObjective
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.probes.knn import knn
from maestro_scale.evaluation.probes.linear import linear_probe
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.packing import BatchMetadata, Field, num_bytes, unpack
from tests.evaluation.conftest import FIELDS
from tests.evaluation.test_dense import CLASSES, layout, split

CPU = torch.device("cpu")
WIDTH = 4
NUM_BATCHES = 3
FIELD = next(t for t in FIELDS.targets if t.kind == "segmentation")
SIDE = task_for(FIELDS).layout.crop_pixels  # type: ignore[union-attr]
PACKED = (
    Field("pixels", "s2", (WIDTH,), "float32"),
    Field("targets", FIELD.name, (SIDE, SIDE), "uint8"),
    Field("ref_date", "", (3,), "int16"),
)


def batches(pin: bool) -> Iterator[Batch]:
    """Packed batches of two samples."""
    rng = np.random.default_rng(0)
    for number in range(NUM_BATCHES):
        block = torch.empty(num_bytes(PACKED, 2), dtype=torch.uint8, pin_memory=pin).zero_()
        batch = unpack(block, PACKED, BatchMetadata("fields", (f"{number}.0", f"{number}.1"), (), 0, 0))
        batch.pixels["s2"].copy_(torch.from_numpy(rng.normal(size=(2, WIDTH)).astype(np.float32)))
        labels = rng.integers(0, len(FIELD.classes), (2, SIDE, SIDE)).astype(np.uint8)
        batch.targets[FIELD.name].copy_(torch.from_numpy(labels))
        recorder.add(MARK, f"load {number}")
        yield batch


def mapped(device: torch.device, precision: str) -> dict[str, Any]:
    """What map_on_device does with the batches, and what it returns."""
    weights = torch.full((WIDTH, 1), 1 / 3).to(device)
    dtypes = []

    def compute(batch: Batch) -> dict[str, torch.Tensor]:
        recorder.add(MARK, "compute")
        product = batch.pixels["s2"] @ weights
        dtypes.append(str(product.dtype))
        return {"product": product.float()}

    recorder.records.clear()
    values = []
    for batch, found in map_on_device(batches(device.type != "cpu"), compute, device, precision):  # type: ignore
        recorder.add(MARK, f"result {batch.keys[0][0]}")
        values.append(found["product"].ravel().tolist())
    kinds = (COPY, SYNC, MARK, RACE, MIX)
    log = [[r.kind, r.op, r.stream] for r in recorder.records if r.kind in kinds]
    return {"values": values, "dtypes": sorted(set(dtypes)), "log": log}


def classified(device: torch.device) -> dict[str, Any]:
    """Predictions of every classifier, and the records of mixed operations and races."""
    recorder.records.clear()
    rng = np.random.default_rng(1)

    def data(num: int) -> LabelledFeatures:
        features = rng.normal(size=(num, 6)).astype(np.float32)
        return LabelledFeatures(features, features[:, :3] > 0.2)

    train, val, test = data(40), data(20), data(10)
    found: dict[str, Any] = {
        name: classifier(train, val, test.features, device=device).predicted.tolist()
        for name, classifier in (("knn", knn), ("linear", linear_probe))
    }
    cells = [split(4, seed) for seed in (1, 2, 3)]
    for name, dense_classifier in (("dense knn", dense.knn), ("dense probe", dense.probe)):
        predicted, chosen = dense_classifier(layout(), CLASSES, *cells, 0, device)
        found[name] = [predicted.tolist(), chosen]
    found["faults"] = [str(r) for r in recorder.records if r.kind in (MIX, RACE)]
    return found


def labelled(device: torch.device) -> dict[str, Any]:
    """Targets and number of terms of a finetuning's micro-batch, and the records of waits."""
    objective: Any = FinetuneObjective(target_loss_for(task_for(FIELDS)), None)  # type: ignore[arg-type]
    host = next(batches(device.type != "cpu"))
    on_device = host.to(device, non_blocking=True)
    recorder.records.clear()
    targets = objective.inputs(host, on_device)
    terms = objective.num_terms("fields", [targets, targets])
    faults = [str(r) for r in recorder.records if r.kind in (SYNC, COPY, MIX, RACE)]
    return {"targets": targets.tolist(), "terms": terms.tolist(), "faults": faults}


def main() -> dict[str, Any]:
    runs: dict[str, Callable[[torch.device], Any]] = {
        "fp32": lambda device: mapped(device, "fp32"),
        "auto": lambda device: mapped(device, "auto"),
        "classified": classified,
        "labelled": labelled,
    }
    with simulation():
        return {name: {"cpu": run(CPU), "device": run(DEVICE)} for name, run in runs.items()}


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
