"""Tiles that lack sensors are scored with what they have: every tile once, the same on any number of ranks."""

from __future__ import annotations

import collections
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from maestro_scale.datasets.spec import Tile
from maestro_scale.evaluation.baselines.registry import build_baseline
from maestro_scale.evaluation.benchmark import Benchmark
from maestro_scale.evaluation.embedding import EmbeddingWriter
from maestro_scale.evaluation.features.cache import FeatureCache, concat_features
from maestro_scale.evaluation.features.missing import check_can_encode, filled, tile_vector
from maestro_scale.evaluation.finetune.setup import Finetuning
from maestro_scale.evaluation.frozen.attentive import HeadGrid, concat_tokens
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.evaluation.in_loop import _Samples
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.evaluation.run import EvalOptions, _Evaluation, run_evaluation
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.maps import cell_features
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import build_model_config, load_recipe
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.sensor_sets import runs
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World
from maestro_scale.training.manifests import UsedDataset
from tests.evaluation.conftest import FIELDS, SPLITS, Fields, field_tile
from tests.testkit.runs import REPO, Trainer

OPTIONAL = replace(FIELDS, modalities=tuple(replace(m, optional=True) for m in FIELDS.modalities))
CPU = torch.device("cpu")


def absent(number: int) -> str:
    """Of four tiles one lacks the image, and one the series, whose grid maps are predicted on."""
    return {1: "aerial", 3: "s2"}.get(number % 4, "")


def lacking(number: int) -> Tile:
    tile = field_tile(number)
    arrays, dates = ({n: a for n, a in d.items() if n != absent(number)} for d in (tile.arrays, tile.dates))
    return replace(tile, arrays=arrays, dates=dates)


@pytest.fixture(scope="module")
def gaps(fields: Fields, tmp_path_factory) -> Fields:
    """The benchmark of fields with tiles that lack a sensor, and its encoder."""
    shards = tmp_path_factory.mktemp("gaps") / "shards"
    first = 0
    for split, count in SPLITS.items():
        with Writer(str(shards), OPTIONAL, split) as writer:
            for number in range(first, first + count):
                writer.add(lacking(number))
        first += count
    return Fields(shards, fields.model)


def source_of(gaps: Fields, cache: Path, split: str = "val") -> Source:
    shards = Manifest.load(str(gaps.shards)).shards_of([split])
    return Source(FIELDS, shards, Store(str(gaps.shards), cache, 2**30))


def numbers(path: Path) -> dict:
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("timings", "recipe")}


@pytest.mark.slow
def test_every_tile_counts_once_on_one_rank_and_on_three(gaps, tmp_path):
    frozen = ("knn", "probe", "attentive")
    recipe = gaps.recipe(tmp_path)
    run_evaluation(EvalOptions(str(recipe), tmp_path / "one", checkpoint=str(gaps.model), modes=frozen))
    course = [
        "train.steps=20",
        "train.global_batch=6",
        "train.micro_batch=2",
        "data.lanes=3",
        "optim.base_lr=2.0e-3",
    ]
    asked = [f"--checkpoint={gaps.model}", f"--out={tmp_path / 'three'}", "--mode=finetune"]
    asked += [f"--mode={mode}" for mode in frozen]
    trainer = Trainer(recipe, entry=REPO / "maestro_scale" / "evaluate.py")
    code, output = trainer.run(None, 3, *asked, "--set", "evaluation.validations=1", *course)
    assert code == 0, output[-4000:]
    for mode in frozen:
        assert numbers(tmp_path / "one" / mode / "results.json") == numbers(
            tmp_path / "three" / mode / "results.json"
        )
    for mode in (*frozen, "finetune"):
        path = tmp_path / "three" / mode / "results.json"
        result = EvalResult.load(path)
        counts = result.load_counts(path)
        assert result.num_tiles == SPLITS["test"]
        assert sorted(counts.keys) == [f"field-{n:03d}" for n in range(27, 38)]
        for key, of_tile in zip(counts.keys, counts.array, strict=True):  # with the labels of that very tile
            cover = field_tile(int(key.removeprefix("field-"))).targets["cover"]
            assert of_tile.sum(1).tolist()[:3] == [(cover == c).sum() for c in (0, 2, 3)]
        assert result.value > 0.4


def test_a_missing_slot_is_the_mean_of_those_that_the_tile_has(gaps, tmp_path):
    model = load_model(gaps.model)
    found = {}
    with torch.no_grad():
        for batch in EvalLoader(source_of(gaps, tmp_path), 64):
            found[batch.dataset] = (
                tile_vector(model, batch),
                model.embed(batch),
                cell_features(model, batch, 4),
            )
    vector, embedding, cells = found["fields"]
    assert torch.equal(vector, embedding.vector)
    for name, has in (("fields~aerial", "s2"), ("fields~s2", "aerial")):
        vector, embedding, cells = found[name]
        assert set(embedding.tokens) == {has}
        first, second = vector.chunk(2, dim=1)
        assert torch.equal(first, second)
        assert torch.equal(first, embedding.tokens[has].mean(dim=(1, 2)))
        assert cells.shape[1:] == (16, 64)
        assert torch.equal(*cells.chunk(2, dim=2))


def test_the_vector_of_a_tile_is_that_of_an_encoder_of_its_sensors_alone(gaps, tmp_path):
    model = load_model(gaps.model)
    for batch in EvalLoader(source_of(gaps, tmp_path), 64):
        complete = EvalLoader(source_of(gaps, tmp_path), 64)
        assert batch.dataset == "fields" or len(batch.pixels) == 1
        assert complete.num_samples == SPLITS["val"]
        with torch.no_grad():
            # The batch itself says which sensors there are; its name only, what is missing.
            plain = model.embed(replace(batch, dataset="fields"))
            for name, tokens in model.encode(batch).items():
                assert torch.equal(tokens, plain.tokens[name])


def test_slots_of_other_widths_are_zero():
    model = build_baseline("statistics", None, FIELDS)
    batch = SimpleNamespace(dataset="fields~aerial")
    parts = filled(model, batch, {"s2": torch.ones(2, 4)})
    assert list(parts) == ["aerial", "s2"]
    assert parts["aerial"].tolist() == [[0.0] * 6] * 2  # a mean and a deviation of three bands


def test_an_attentive_head_sees_the_tokens_that_a_tile_has(gaps, tmp_path):
    model = load_model(gaps.model)
    objective = target_loss_for(task_for(FIELDS))
    loader = EvalLoader(source_of(gaps, tmp_path), 5)
    batches = list(loader)
    with torch.no_grad():
        tokens = torch.cat([concat_tokens(model, batch) for batch in batches]).numpy()
        labels = np.concatenate([objective.task.labels(batch) for batch in batches])
    rows = np.random.default_rng(0).permutation(len(tokens))  # in the order of a training, sets are mixed
    split = FeatureCache(tokens, labels, np.arange(len(tokens)), loader.absent_of_items()).take(rows)
    assert set(split.absent) == {"", "aerial", "s2"}
    heads = HeadGrid(objective, model.view("fields"), tokens.shape[-1], 0, CPU)
    head = heads.heads[-1]
    with torch.no_grad():
        expected = torch.cat([head(model.encode(batch)) for batch in batches])[torch.from_numpy(rows)]
        answers = torch.cat([logits for logits, _ in heads.logits(head, split)])
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)
    heads.backward(split, np.arange(len(rows)))
    found = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    targets = objective.loss_targets(torch.from_numpy(labels))
    firsts = np.cumsum([0, *map(len, batches)])
    for batch, first in zip(batches, firsts, strict=False):
        with torch.no_grad():
            grids = model.encode(batch)
        part = targets[first : first + len(batch)]
        (objective.loss_sum(head(grids), part) / objective.num_terms(targets)).backward()
    for a, p in zip(found, head.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)


def test_splits_of_a_role_keep_what_their_tiles_lack():
    plain = FeatureCache(np.zeros((2, 3)), np.zeros(2), np.arange(2))
    gappy = FeatureCache(np.zeros((3, 3)), np.zeros(3), np.arange(3), np.array(["", "s2", "aerial"]))
    assert concat_features([plain, plain]).absent is None
    assert concat_features([plain, gappy]).absent.tolist() == ["", "", "", "s2", "aerial"]


def test_embeddings_have_one_length_and_the_token_grids_that_a_tile_has(gaps, tmp_path):
    manifest = Manifest.load(str(gaps.shards))
    found = {}
    for what in ("vector", "tokens"):
        store = Store(str(gaps.shards), tmp_path / "cache", 2**30)
        writer = EmbeddingWriter(load_model(gaps.model), store, manifest, what, batch_size=3)
        assert writer.write(tmp_path / what, "test") == 4 * SPLITS["test"]
        tables = {p.stem: parquet.read_table(p) for p in sorted((tmp_path / what).glob("*.parquet"))}
        assert sum(t.num_rows for t in tables.values()) == 4 * SPLITS["test"]
        found[what] = tables
    assert {t.schema.field("vector").type.list_size for t in found["vector"].values()} == {64}
    for shard in manifest.shards_of(["test"]):
        table = found["tokens"][Path(shard.path).stem]
        assert {"aerial", "s2"} & set(table.column_names) == {"aerial", "s2"} - {*shard.absent}
        keys = {int(key.as_py().removeprefix("field-")) for key in table["key"]}
        assert {absent(number) for number in keys} == {"".join(shard.absent)}


def test_a_baseline_scores_every_tile_and_one_that_needs_all_sensors_says_so(gaps, tmp_path):
    benchmark = Benchmark(FIELDS, str(gaps.shards), tmp_path / "cache", tmp_path / "features")
    model = build_baseline("statistics", None, FIELDS)
    (result,) = evaluate_frozen(model, benchmark, ["probe"])
    assert result.num_tiles == SPLITS["test"]
    assert result.value > 0.5
    model.encodes_each_sensor = False
    with pytest.raises(EvaluationError, match=r"statistics: fields has tiles that lack (aerial|s2)"):
        check_can_encode(model, [source_of(gaps, tmp_path)])
    with pytest.raises(EvaluationError, match="this encoder needs all of its sensors"):
        evaluate_frozen(model, benchmark, ["knn"])


@pytest.mark.parametrize("sensors", [FIELDS.sensors, FIELDS.sensors[1:]])
def test_scores_during_a_training_are_of_tiles_of_every_set(gaps, tmp_path, sensors):
    """Of 20 tiles 10 are complete, and 5 lack each sensor: with one sensor, 5 tiles have none. 4 crops a tile."""
    spec = replace(FIELDS, sensors=sensors)
    recipe = load_recipe(gaps.recipe(tmp_path), ["evaluation.num_crops=32"])
    model = Maestro(build_model_config(recipe, [spec])).initialise(0)
    benchmark = UsedDataset("fields", str(gaps.shards), Manifest.load(str(gaps.shards)), ("train",))
    samples = _Samples(recipe, model, World(0, 1, 0, CPU), benchmark, spec)
    loader = samples._loaders["train"]
    assert loader.num_samples == 8
    counts = collections.Counter(absent for absent, n in runs(loader.source) for _ in range(n))
    both = {(): 4, ("aerial",): 2, ("s2",): 2}
    assert counts == (both if len(sensors) == 2 else {(): 8})


@pytest.mark.parametrize(("incomplete", "num_train"), [("use", 20), ("leave_out", 10)])
def test_a_finetuning_leaves_incomplete_tiles_out_where_the_recipe_says_so(
    gaps, tmp_path, incomplete, num_train
):
    recipe = load_recipe(gaps.recipe(tmp_path), [f"data.mixture[0].incomplete={incomplete}"])
    encoder = SimpleNamespace(spec=FIELDS, manifest=None)
    asked = SimpleNamespace(options=EvalOptions(str(tmp_path), tmp_path))
    run = SimpleNamespace(splits={}, fold=None)
    benchmark = _Evaluation._benchmark(asked, encoder, recipe, run)
    world = World(0, 1, 0, CPU)
    finetuning = Finetuning(load_model(gaps.model), benchmark, "finetune", None, recipe, world)
    assert {role: sum(s.counts) for role, s in finetuning.splits.items()} == {
        "train": num_train,
        "val": SPLITS["val"],
        "test": SPLITS["test"],
    }
    found = finetuning._identity("", 1)
    assert found.get("incomplete", "use") == incomplete
