"""The attentive probe: the head of a finetuning on cached tokens of a frozen encoder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from maestro_scale.evaluation.baselines.statistics import ChannelStatistics
from maestro_scale.evaluation.benchmark import Benchmark
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.finetune.predictor import build_predictor
from maestro_scale.evaluation.frozen import attentive
from maestro_scale.evaluation.frozen.attentive import HeadGrid, attentive_probe, concat_tokens
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.probes import lr_grid as course
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.config import DatasetView
from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.eval_loader import EvalLoader
from tests.evaluation.conftest import FIELDS, SCENES, SPLITS
from tests.evaluation.test_feature_cache import CROPS_PER_TILE, numbers
from tests.evaluation.test_fraction import source_of

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(course, "MIN_STEPS", 60)


@pytest.fixture
def benchmark(fields, tmp_path):
    return Benchmark(FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features")


def test_it_reads_places_and_dates_and_is_encoded_once(fields, benchmark, quick, tmp_path):
    model, passes = load_model(fields.model), []
    model.encode = lambda batch: (passes.append(len(batch)), Maestro.encode(model, batch))[1]
    (first,) = evaluate_frozen(
        model, benchmark, ["attentive"], maps_dirs={"attentive": tmp_path / "attentive"}
    )
    assert sum(passes) == CROPS_PER_TILE * sum(SPLITS.values())
    assert first.value > 0.85
    assert first.chosen["lr"] in attentive.LEARNING_RATES
    assert len(list((tmp_path / "attentive").glob("*.tif"))) == SPLITS["test"]
    assert first.maps["answer"].shape == first.maps["truth"].shape
    passes.clear()
    again, linear = evaluate_frozen(model, benchmark, ["attentive", "probe"])
    assert sum(passes) == CROPS_PER_TILE * sum(SPLITS.values()), "pooled features are kept beside tokens"
    assert numbers(again) == numbers(first)
    assert linear.mode == "probe"


def test_its_head_is_that_of_a_finetuning(fields, tmp_path):
    model = load_model(fields.model)
    objective = target_loss_for(task_for(FIELDS))
    network = build_predictor(model, "fields", objective, seed=3, pretrained=True).eval()
    (batch,) = EvalLoader(source_of(fields.shards, "val", tmp_path), 64, crops=4)
    with torch.no_grad():
        tokens = concat_tokens(model, batch).numpy()
        split = FeatureCache(tokens, objective.task.labels(batch), np.arange(len(batch)))
        heads = HeadGrid(objective, model.view("fields"), tokens.shape[-1], 0, CPU)
        (weights,) = [network.heads[name] for name in network.heads]
        heads.heads[0].load_state_dict(weights.state_dict())
        answers = torch.cat([logits for logits, _ in heads.logits(heads.heads[0], split)])
        torch.testing.assert_close(answers, network.logits(batch), rtol=1e-4, atol=1e-5)


def test_gradients_of_the_mean_over_pixels_do_not_depend_on_the_chunks(fields, tmp_path, monkeypatch):
    model = load_model(fields.model)
    objective = target_loss_for(task_for(FIELDS))
    (batch,) = EvalLoader(source_of(fields.shards, "val", tmp_path), 64, crops=2)
    with torch.no_grad():
        tokens = concat_tokens(model, batch).numpy()
    split = FeatureCache(tokens, objective.task.labels(batch), np.arange(len(batch)))

    def gradients(most_tokens):
        monkeypatch.setattr(attentive, "_MAX_TOKENS", most_tokens)
        heads = HeadGrid(objective, model.view("fields"), tokens.shape[-1], 0, CPU)
        heads.backward(split, np.arange(len(batch)))
        return [p.grad for p in heads.heads[-1].parameters()], heads

    (whole, heads), (cut, _) = gradients(2**17), gradients(1)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    ((logits, labels),) = heads.logits(heads.heads[-1], split)
    targets = objective.loss_targets(torch.from_numpy(labels))
    parameters = list(heads.heads[-1].parameters())
    logits = heads.heads[-1](heads._tokens(split, np.arange(len(batch))))
    loss = objective.loss_sum(logits, targets) / (targets != dense.IGNORED).sum()
    for a, b in zip(whole, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_classes_are_found_from_the_one_informative_token():
    """Of twelve tokens one, anywhere, carries the label: attention finds it, a mean over tokens hardly would."""
    view = DatasetView.of_spec(SCENES)
    objective = target_loss_for(task_for(SCENES))
    marks = np.random.default_rng(9).normal(size=(len(SCENES.targets[0].classes), 32))
    num_tokens = SCENES.sensors[0].num_dates

    def split(num_tiles, seed):
        rng = np.random.default_rng(seed)
        tokens = 0.3 * rng.normal(size=(num_tiles, num_tokens, 32))
        kind = rng.integers(0, len(marks), num_tiles)
        tokens[np.arange(num_tiles), rng.integers(0, num_tokens, num_tiles)] = marks[kind]
        return FeatureCache(
            tokens.astype(np.float16), np.eye(len(marks), dtype=bool)[kind], np.arange(num_tiles)
        )

    train, val, test = split(600, 1), split(80, 2), split(80, 3)
    answer = attentive_probe(objective, view, train, val, test, 0, CPU)
    assert objective.task.statistic(answer.counts.sum(0)) > 0.9
    again = attentive_probe(objective, view, train, val, test, 0, CPU)
    np.testing.assert_array_equal(answer.counts, again.counts)


def test_impossible_fits_are_refused(fields, benchmark):
    model = load_model(fields.model)
    view = model.view("fields")
    statistics = ChannelStatistics(FIELDS)
    with pytest.raises(
        EvaluationError, match="tokens of one width, these have: aerial 6, s2 4; use --mode probe"
    ):
        evaluate_frozen(statistics, benchmark, ["attentive"])
    alone = dataclasses.replace(FIELDS, sensors=FIELDS.sensors[1:])
    with pytest.raises(EvaluationError, match="whose width 8 divides, these have 4; use --mode probe"):
        evaluate_frozen(ChannelStatistics(alone), benchmark, ["attentive"])
    objective = target_loss_for(task_for(FIELDS))
    grids = sum(view.rows(s) * s.grid**2 for s in view.sensors)
    blank = FeatureCache(
        np.zeros((4, grids, 8), np.float16), np.full((4, 4, 4), dense.IGNORED, np.uint8), np.arange(4)
    )
    with pytest.raises(EvaluationError, match="every label of the training split is ignored"):
        attentive_probe(objective, view, blank, blank, blank, 0, CPU)
