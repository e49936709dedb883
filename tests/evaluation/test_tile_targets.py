"""Classification and regression targets: labels, frozen classifiers, heads and losses, results."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import rasterio
import torch
from safetensors.torch import load_file
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
)

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.baselines.registry import build_baseline
from maestro_scale.evaluation.benchmark import Benchmark, Provenance
from maestro_scale.evaluation.finetune import early_stop
from maestro_scale.evaluation.finetune.early_stop import ValidationScore
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.evaluation.metric_kinds import METRIC_KINDS
from maestro_scale.evaluation.metrics import best_index
from maestro_scale.evaluation.probes.regression import NumberFeatures, knn_regression, ridge
from maestro_scale.evaluation.regression_metrics import regression_scores, rmse, tile_sums
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.evaluation.tasks.class_weights import ClassWeights, class_weights
from maestro_scale.evaluation.tasks.classification import ClassificationLoss, ClassificationTask
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.protocol import LossSettings
from maestro_scale.evaluation.tasks.regression import LabelScale, RegressionLoss, RegressionTask
from maestro_scale.evaluation.tasks.subset import class_weights as subset_weights
from maestro_scale.evaluation.tasks.subset import read_label_counts
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.interop.export import write_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.decoders import build_head
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.source import Source
from tests.testkit.models import TINY
from tests.testkit.runs import REPO, Trainer
from tests.testkit.stands import SPEC, stand, write_stands

KIND = ClassificationTask(Target("kind", "classification", ("a", "b", "c")))
HEIGHT = RegressionTask(Target("height", "regression", units="m"))


@pytest.fixture(scope="module")
def stands(tmp_path_factory):
    return write_stands(tmp_path_factory.mktemp("stands") / "shards")


def benchmark(stands, tmp_path, target: str) -> Benchmark:
    return Benchmark(SPEC, str(stands), tmp_path / "cache", tmp_path / "features", 2**30, target)


def evaluated(stands, tmp_path, target: str, modes, baseline: str = "statistics") -> list[EvalResult]:
    encoder = build_baseline(baseline, None, SPEC)
    return evaluate_frozen(encoder, benchmark(stands, tmp_path, target), modes, Provenance(encoder=baseline))


def test_no_label_is_no_score():
    """One tile of class a that is found, and no labelled tile: the second score must not be 0."""
    counts = np.zeros((2, 3, 3))
    counts[0, 0, 0] = 1
    assert KIND.statistic(counts)[0] == 1
    assert np.isnan(KIND.statistic(counts)[1])


def test_one_class_per_tile_is_learned_and_missing_labels_do_not_count(stands, tmp_path):
    for result in evaluated(stands, tmp_path, "genus", ("knn", "probe")):
        assert result.value > 0.85
        assert result.metric == "wf1"
        assert list(result.per_class) == ["oak", "pine", "larch"]  # spruce is ignored
        assert result.num_tiles == 40
        labelled = sum(map(sum, result.confusion))
        assert 20 < labelled < 35  # without the missing ones and spruce
        assert result.scores["accuracy"] == pytest.approx(
            sum(row[i] for i, row in enumerate(result.confusion)) / labelled
        )
        result.write(tmp_path / "results.json")
        assert EvalResult.load(tmp_path / "results.json") == result


def test_a_number_per_tile_is_learned_and_scored_in_its_units(stands, tmp_path):
    for result in evaluated(stands, tmp_path, "biomass", ("knn", "probe")):
        assert (result.metric, result.units, result.per_class) == ("rmse", "t/ha", {})
        assert result.value < 15  # t/ha; the deviation of the labels is about 40
        assert result.scores["r2"] > 0.85
        assert result.interval[0] < result.value < result.interval[1]
        assert result.synthetic is True
        result.write(tmp_path / "results.json")
        assert EvalResult.load(tmp_path / "results.json") == result


def test_a_map_of_numbers_is_learned_from_overlapping_crops(stands, tmp_path):
    for result in evaluated(stands, tmp_path, "vigour", ("knn", "probe")):
        assert result.scores["r2"] > 0.8
        assert (
            result.counts.array[:, 0].tolist() == [35.0] * 40
        )  # of 36 pixels one is missing, none counts twice
        assert result.maps["answer"].dtype == np.float32
        assert np.isnan(result.maps["truth"][0, 0, 0])


def test_predicted_maps_of_numbers_are_geotiffs_with_their_units(stands, tmp_path):
    folder = tmp_path / "maps"
    encoder = build_baseline("statistics", None, SPEC)
    evaluate_frozen(encoder, benchmark(stands, tmp_path, "vigour"), ("probe",), maps_dirs={"probe": folder})
    assert len(list(folder.glob("*.tif"))) == 40
    with rasterio.open(folder / "stand-080.tif") as image:  # the first test tile by key, not in the shards
        assert (image.dtypes, image.shape, image.tags(1)) == (("float32",), (6, 6), {"units": "1"})
        error = image.read(1) - stand(80)["targets"]["vigour"]
    assert np.sqrt(np.nanmean(error**2)) < 0.1
    with pytest.raises(EvaluationError, match="biomass has labels for whole tiles"):
        evaluate_frozen(
            encoder, benchmark(stands, tmp_path, "biomass"), ("probe",), maps_dirs={"probe": folder}
        )


def test_scores_of_classes_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    labels[::7] = -1
    found = KIND.predictions(predicted, labels, {})
    truth, answer = labels[labels >= 0], predicted[labels >= 0]
    total = KIND.total(found.counts)
    assert float(KIND.statistic(total)) == pytest.approx(f1_score(truth, answer, average="weighted"))
    assert found.scores["accuracy"] == pytest.approx(accuracy_score(truth, answer))
    assert found.scores["macro_f1"] == pytest.approx(f1_score(truth, answer, average="macro"))
    np.testing.assert_allclose(KIND.per_class(total), f1_score(truth, answer, average=None))
    # By hand: labels a a b, predictions a b b: F1 of a is 2/3, of b 2/3, c is in neither.
    found = KIND.predictions(np.array([0, 1, 1]), np.array([0, 0, 1]), {})
    assert found.scores == pytest.approx({"accuracy": 2 / 3, "macro_f1": 2 / 3})
    assert found.confusion == ((1, 1, 0), (0, 1, 0), (0, 0, 0))


def test_scores_of_numbers_equal_those_of_scikit_learn_however_tiles_are_split():
    rng = np.random.default_rng(0)
    labels = (1000 + rng.normal(size=(30, 4))).astype(np.float32)
    predicted = labels + rng.normal(size=labels.shape).astype(np.float32)
    labels[::3, 1] = np.nan
    truth, answer = labels[~np.isnan(labels)], predicted[~np.isnan(labels)]
    sums = tile_sums(predicted, labels)
    parts = np.concatenate([tile_sums(predicted[i : i + 7], labels[i : i + 7]) for i in range(0, 30, 7)])
    assert (sums == parts).all()
    total = sums.sum(0)
    assert float(rmse(total)) == pytest.approx(mean_squared_error(truth, answer) ** 0.5)
    scores = regression_scores(total)
    assert scores["r2"] == pytest.approx(r2_score(truth, answer), rel=1e-6)
    assert scores["mae"] == pytest.approx(mean_absolute_error(truth, answer))
    # By hand: errors +1 and -3 of labels 0 and 2.
    by_hand = tile_sums(np.array([1.0, -1.0]), np.array([0.0, 2.0]))
    assert by_hand.sum(0).tolist() == [2, -2, 10, 4, 2, 4]
    assert float(rmse(by_hand.sum(0))) == pytest.approx(5**0.5)
    assert regression_scores(by_hand.sum(0)) == {"r2": -4.0, "mae": 2.0, "bias": -1.0}
    assert np.isnan(rmse(np.zeros(6)))


def test_ridge_minimises_its_objective_and_prefers_the_lowest_validation_error():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    y = (x @ [2.0, -1.0, 0.0] + 5).astype(np.float32)
    y[3] = np.nan
    train = NumberFeatures.of(x, y, "training")
    assert len(train.labels) == 39
    found = ridge(train, train, x, l2=(0.1, 1.0))
    assert found.chosen == {"l2": 0.1}
    standard = (train.features - train.features.mean(0, np.float64)) / train.features.std(0, np.float64)
    centred = train.labels - train.labels.mean(dtype=np.float64)
    gram = standard.T @ standard / 39
    weights = np.linalg.solve(gram + 0.1 * np.eye(3), standard.T @ centred / 39)
    expected = standard @ weights + train.labels.mean(dtype=np.float64)
    np.testing.assert_allclose(np.delete(found.predicted, 3), expected, rtol=1e-6)
    with pytest.raises(EvaluationError, match="every label of the validation split is missing"):
        NumberFeatures.of(x, np.full(40, np.nan), "validation")


def test_nearest_neighbours_predict_the_weighted_mean():
    train = NumberFeatures(np.eye(2, dtype=np.float32), np.array([10.0, 20.0], np.float32))
    found = knn_regression(train, train, np.array([[1, 1], [1, 0]], np.float32), (2,), (0.5,))
    # Cosines of the second query: 1 and 0; weights e² : 1.
    near = np.exp(2) / (np.exp(2) + 1)
    np.testing.assert_allclose(found.predicted, [15.0, 10 * near + 20 * (1 - near)], rtol=1e-6)


def test_the_loss_of_a_number_is_that_of_standardised_values_without_missing_ones():
    loss = RegressionLoss(HEIGHT, LabelScale.of(np.array([4.0, 40.0, 436.0])))  # mean 10, variance 9
    labels = torch.tensor([13.0, float("nan"), 10.0])
    logits = torch.tensor([[0.0], [7.0], [2.0]], requires_grad=True)
    assert loss.num_terms(labels).item() == 2
    total = loss.loss_sum(logits, labels)
    assert total.item() == pytest.approx(1.0 + 4.0)  # (0 - 1)² + (2 - 0)²
    total.backward()
    assert logits.grad[:, 0].tolist() == [-2.0, 0.0, 4.0]
    assert loss.predict(logits.detach()).tolist() == [10.0, 31.0, 16.0]
    smooth = RegressionTask(HEIGHT.target, LossSettings(regression="smooth_l1"))
    assert RegressionLoss(smooth, loss.scale).loss_sum(logits, labels).item() == pytest.approx(0.5 + 1.5)
    assert LabelScale.of(np.array([3.0, 6.0, 12.0])) == LabelScale(2.0, 1.0)  # all labels are equal


def test_class_weights_scale_the_loss_and_keep_its_size():
    counts = np.array([6.0, 2.0, 0.0])
    balanced = class_weights(LossSettings("balanced"), ("a", "b", "c"), counts)
    # 1/6 and 1/2, times 4 so that the mean over the 8 labels is 1; c has no label.
    assert balanced.values == pytest.approx((4 / 6, 2.0, 1.0))
    given = class_weights(LossSettings({"b": 3.0}), ("a", "b", "c"), counts)
    assert given.values == pytest.approx((8 / 12, 2.0, 8 / 12))
    assert class_weights(LossSettings(), ("a",), None) is None
    with pytest.raises(EvaluationError, match=r"'bb' is not a class \(did you mean"):
        class_weights(LossSettings({"bb": 1.0}), ("aaaa", "bbb"), np.ones(2))
    loss = ClassificationLoss(KIND, ClassWeights((1.0, 3.0, 1.0)))
    targets = torch.tensor([0, 1, -1])
    assert loss.num_terms(targets).item() == 4.0
    assert loss.loss_sum(torch.zeros(3, 3), targets).item() == pytest.approx(4 * np.log(3))


@pytest.mark.parametrize("target", ["genus", "biomass", "vigour"])
def test_heads_of_an_attentive_probe_keep_the_scale_of_their_labels(stands, tmp_path, target):
    task = task_for(SPEC, target)
    counts = np.array([4.0, 40.0, 436.0]) if target != "genus" else None
    loss = target_loss_for(task, counts)
    ref = SPEC.sensor("s2")
    head = build_head(task.target, 8, "mean", ref, 1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(0.0)
    loss.prepare(head)
    output = head({"s2": torch.ones(2, 4, 16, 8)})
    predicted = loss.predict(output)
    if target == "genus":
        assert predicted.tolist() == [0, 0]
    else:
        assert (predicted == 10.0).all(), "zero is the mean"
        assert {name for name, _ in head.named_buffers()} == {"mean", "deviation"}
        assert (head.in_units(output) == 10.0).all()


@pytest.mark.slow
def test_an_attentive_probe_learns_numbers_and_classes(stands, tmp_path, monkeypatch):
    monkeypatch.setattr("maestro_scale.evaluation.probes.lr_grid.MIN_STEPS", 100)
    config = ModelConfig(
        sensors=SPEC.sensors, size=TINY, pos_grid=4, inter_depth=1, ref_sensor="s2", dataset="stands"
    )
    encoder = Maestro(config).initialise(0).eval()
    for target, score, least in (("biomass", "r2", 0.5), ("genus", "accuracy", 0.8), ("vigour", "r2", 0.15)):
        (result,) = evaluate_frozen(encoder, benchmark(stands, tmp_path, target), ("attentive",))
        assert result.scores[score] > least, target


def test_results_of_a_regression_may_leave_0_to_1_and_others_not(tmp_path):
    result = EvalResult(
        "stands", "rmse", "probe", 31.0, {}, (29.0, 33.0), 5, scores={"r2": -0.5, "bias": -2.0}
    )
    path = tmp_path / "results.json"
    result.write(path)
    assert EvalResult.load(path) == result
    for change, message in (
        ({"metric": "wf1"}, "value is 31.0, not a fraction"),
        ({"value": 1e999}, "not a number"),
    ):
        values = json.loads(path.read_text()) | change
        other = tmp_path / "other.json"
        other.write_text(json.dumps(values))
        with pytest.raises(EvaluationError, match=message):
            EvalResult.load(other)
    with pytest.raises(ValueError, match="score r2"):
        dataclasses.replace(result, scores={"r2": float("nan")}).write(path)


def test_of_validation_scores_the_lowest_is_best_where_the_metric_says_so():
    history = [
        ValidationScore(10, 5.0),
        ValidationScore(20, 3.0),
        ValidationScore(30, 3.0),
        ValidationScore(40, 4.0),
    ]
    assert METRIC_KINDS["rmse"].sign == -1
    assert early_stop.best(history, -1).step == 20
    assert early_stop.best(history).step == 10
    assert early_stop.exhausted(history, 2, -1)
    assert not early_stop.exhausted(history, 3, -1)
    assert best_index([3.0, 1.0, 1.0], sign=-1) == 1


def test_label_counts_are_those_of_every_training_tile(stands, tmp_path):
    store = Store(str(stands), tmp_path / "cache", 2**20)
    source = Source(SPEC, Manifest.load(str(stands)).shards_of(["train"]), store)
    labels = [stand(n)["targets"] for n in range(60)]
    weights = np.array([t["biomass"] for t in labels if t["biomass"] is not None], np.float32).astype(float)
    found = read_label_counts(source, task_for(SPEC, "biomass"))
    np.testing.assert_allclose(found, [52, weights.sum(), (weights**2).sum()], rtol=1e-12)
    assert LabelScale.of(found).deviation == pytest.approx(weights.std(), rel=1e-6)
    genera = [t["genus"] for t in labels]
    expected = [genera.count(name) for name in ("oak", "pine", "larch")]
    assert read_label_counts(source, task_for(SPEC, "genus")).tolist() == expected
    assert read_label_counts(source, task_for(SPEC, "vigour"))[0] == 60 * 35


def test_a_fraction_of_numbers_is_drawn_from_all_deciles(stands, tmp_path):
    store = Store(str(stands), tmp_path / "cache", 2**20)
    source = Source(SPEC, Manifest.load(str(stands)).shards_of(["train"]), store)
    deciles = subset_weights(source, SPEC.target("biomass"))
    assert deciles.sum(0).tolist() in ([5, 5, 5, 6, 5, 5, 5, 5, 5, 6], [6, 5, 5, 5, 5, 6, 5, 5, 5, 5])
    assert (deciles.sum(1) == 0).sum() == 8  # no label
    assert subset_weights(source, SPEC.target("genus")).sum(0).shape == (3,)


@pytest.mark.slow
def test_a_finetuning_learns_a_number_keeps_its_scale_and_tests_the_lowest_error(stands, tmp_path):
    config = ModelConfig(
        sensors=SPEC.sensors, size=TINY, pos_grid=4, inter_depth=1, ref_sensor="s2", dataset="stands"
    )
    write_model(tmp_path / "model", Maestro(config).initialise(0).state_dict(), config, {"step": 0})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: stands\ndata:\n  mixture: [{{dataset: stands, shards: {str(stands)!r}, split: train}}]\n"
        f"  cache_dir: {str(tmp_path / 'cache')!r}\n  workers: 0\ntracking: {{enabled: false}}\n"
    )
    course = "train.steps=100 train.global_batch=16 train.micro_batch=16 train.precision=fp32 data.lanes=1 "
    course += "optim.base_lr=2e-3 evaluation.ema=0.9 evaluation.validations=4 checkpoint.every_steps=100"
    trainer = Trainer(recipe, entry=REPO / "maestro_scale" / "evaluate.py")
    arguments = [f"--checkpoint={tmp_path / 'model'}", "--mode=finetune", "--target=biomass"]
    code, output = trainer.run(None, 1, f"--out={tmp_path / 'out'}", *arguments, "--set", *course.split())
    assert code == 0, output[-4000:]
    folder = tmp_path / "out" / "finetune"
    result = EvalResult.load(folder / "results.json")
    assert "t/ha" in output
    assert result.scores["r2"] > 0.4
    scores = {
        v["step"]: v["score"] for v in map(json.loads, (folder / "validation.jsonl").read_text().splitlines())
    }
    assert result.chosen == {"step": min(scores, key=scores.get), "validation": min(scores.values())}
    (best,) = (folder / "best").iterdir()
    assert 95 < load_file(best)["heads.biomass.mean"].item() < 110  # t/ha
