"""Evaluations and finetuning on the simulated device: frozen encoders, their classifiers, maps and embeddings.

The runs are in ``evaluation.py``: a segmentation benchmark with maps, and a multilabel one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from testkit.simulated.recorder import COPY, KERNEL, MIX, RACE, SYNC
from testkit.simulated.steps import DECISION, FLAGS, STEP, is_constant, run_script, steps_of, violations

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("evaluation.py")
DATASETS = ("fields", "treesatai_ts")
RUNS = [f"{dataset} {name}" for dataset in DATASETS for name in ("knn", "attentive", "finetune", "embed")]

# Crops of the splits, in batches of 4 (embed) or BATCH_SIZE.
BATCHES = {"fields knn": 6, "fields attentive": 6, "treesatai_ts knn": 3, "treesatai_ts attentive": 3}
BATCHES |= {"fields embed": 40, "treesatai_ts embed": 14}
RESULTS = ("maestro_scale/stream/device_copy.py", "wait")  # the host waits for the results of a batch
EVALUATION = "maestro_scale/evaluation/"
# All places in which the host waits: (phase, file, function). Except for RESULTS not per batch of the encoder.
PLACES = {
    ("encode", *RESULTS),
    ("encode", f"{EVALUATION}features/cache.py", "weights_digest"),
    ("encode", f"{EVALUATION}frozen/evaluate.py", "evaluate_frozen"),  # the weights
    ("encode", f"{EVALUATION}frozen/attentive.py", "__init__"),  # the weights of the heads
    ("encode", f"{EVALUATION}frozen/attentive.py", "predict"),
    ("encode", f"{EVALUATION}probes/dense.py", "__init__"),
    ("encode", f"{EVALUATION}probes/dense.py", "_vote"),
    ("encode", f"{EVALUATION}probes/dense.py", "best_class"),
    ("encode", f"{EVALUATION}probes/knn.py", "knn"),
    ("encode", f"{EVALUATION}probes/linear.py", "_minimise"),
    ("encode", f"{EVALUATION}probes/linear.py", "linear_probe"),
    ("setup", "maestro_scale/training/assembly.py", "_build_engine"),
    ("setup", f"{EVALUATION}finetune/setup.py", "assemble"),
    # The digest of the best weights, which are copied to the host to be saved, and are checked when they are loaded.
    ("setup", f"{EVALUATION}features/cache.py", "weights_digest"),
    ("validation", f"{EVALUATION}features/cache.py", "weights_digest"),
    ("log", "maestro_scale/training/device.py", "synchronize"),
    ("validation", *RESULTS),
    ("validation", f"{EVALUATION}finetune/predictions.py", "predict_split"),
    ("validation", f"{EVALUATION}tasks/first_maps.py", "gather"),
    ("validation", "maestro_scale/interop/tensors.py", "write_tensors"),
    ("checkpoint", "maestro_scale/training/fragments.py", "adam_step"),
    ("checkpoint", "maestro_scale/training/checkpoint/state.py", "pieces"),
    # The test split, after the training.
    ("setup", *RESULTS),
    ("setup", f"{EVALUATION}finetune/validation.py", "load_best"),
    ("setup", f"{EVALUATION}finetune/predictions.py", "predict_split"),
    ("setup", f"{EVALUATION}tasks/first_maps.py", "gather"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, synthetic_shards) -> dict[str, dict]:
    return run_script(SCRIPT, tmp_path_factory.mktemp("simulated"), synthetic_shards)


@pytest.mark.parametrize("name", RUNS)
def test_no_operation_mixes_devices_and_no_stream_races(name, found):
    assert [str(r) for r in found[name]["records"] if r.kind in (MIX, RACE)] == []


@pytest.mark.parametrize("name", RUNS)
def test_scores_are_those_of_a_cpu(name, found):
    scores = found[name]["cpu scores"]
    assert len(scores) in (1, 2)
    # kNN and linear probe are on features of an encoder in bf16, the others in fp32.
    tolerance = {"abs": 0.02} if name.endswith("knn") else {"rel": 1e-5}
    assert found[name]["simulated scores"] == pytest.approx(scores, **tolerance)


@pytest.mark.parametrize("name", BATCHES)
def test_encoding_waits_once_per_batch_and_copies_on_other_streams(name, found):
    records = [r for r in found[name]["records"] if r.phase == "encode"]
    waits = [r for r in records if r.kind == SYNC and (r.file, r.function) == RESULTS]
    assert len(waits) == BATCHES[name]
    copies = [r for r in records if r.kind == COPY and r.file == "maestro_scale/stream/batch.py"]
    assert len(copies) == BATCHES[name]
    copies += [r for r in records if r.kind == COPY and r.file == "maestro_scale/stream/device_copy.py"]
    assert all(r.stream != 0 and "pinned" in r.detail for r in copies)


def test_the_host_waits_elsewhere_once_per_split_or_classifier(found):
    records = [
        r for name in RUNS for r in found[name]["records"] if r.kind == SYNC and r.package == "maestro_scale"
    ]
    others = [r for r in records if r.phase not in {*STEP, "warm-up"} and not is_constant(r)]
    assert {(r.phase, r.file, r.function) for r in others} == PLACES


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_step_of_a_finetuning_waits_twice_after_the_kernels_of_the_optimizer_are_queued(dataset, found):
    records = found[f"{dataset} finetune"]["records"]
    steps = steps_of(records)
    assert len(steps) == 6
    for step in steps:
        assert [(r.file, r.function) for r in step.own_waits] == [DECISION, FLAGS], [
            str(r) for r in step.own_waits
        ]
        updates = [i for i, r in enumerate(step.records) if r.kind == KERNEL]
        assert updates[-1] < step.records.index(step.own_waits[0])
    assert violations(records) == []


def test_a_batch_that_is_dropped_too_early_is_reported(found):
    lines = [str(r) for r in found["no record_stream"]["records"] if r.kind == RACE]
    assert lines
    assert all("freed on stream" in line for line in lines)
