"""Finetuning from the command line: it learns, starts from pretrained weights, ends early, and survives a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from testkit.models import noise_batch, small_config
from testkit.runs import REPO, Trainer, metrics

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluate import main as evaluate
from maestro_scale.evaluation.features.load_encoder import export_run, load_encoder
from maestro_scale.evaluation.finetune import early_stop, validation
from maestro_scale.evaluation.finetune.early_stop import ValidationScore
from maestro_scale.evaluation.finetune.predictor import build_predictor
from maestro_scale.evaluation.finetune.tested import check_target
from maestro_scale.evaluation.paired import difference, load_runs
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.evaluation.tasks.losses import MultilabelLoss, target_loss_for
from maestro_scale.evaluation.tasks.task import MultilabelTask, task_for
from maestro_scale.interop.export import ExportError, write_model
from maestro_scale.interop.pretrained import load_model
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.optimizer import build_optimizer, set_lr
from tests.evaluation.conftest import FIELDS, SPLITS, field_tile
from tests.evaluation.test_fraction import source_of

EVALUATE = REPO / "maestro_scale" / "evaluate.py"
NUM_CLASSES = 3
COURSE = [
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.precision=fp32",
    "train.log_every=1",
    "train.steps=12",
    "evaluation.overlap=0.25",
    "data.lanes=2",
    "optim.base_lr=2e-3",
    "optim.final_div=2",
    "evaluation.ema=0.9",
    "evaluation.layer_decay=0.9",
    "evaluation.validations=6",
    "evaluation.patience=0",
    "checkpoint.every_steps=3",
    "deepspeed.zero_optimization.stage=1",
]


def command(out, *args, course=()):
    return [f"--out={out}", *args, "--set", *COURSE, *course]


def evaluated(fields, tmp_path, out, *args, ranks=1, course=()):
    """What a run that must succeed printed."""
    trainer = Trainer(fields.recipe(tmp_path), entry=EVALUATE)
    code, output = trainer.run(None, ranks, *command(out, *args, course=course))
    assert code == 0, output[-4000:]
    return output


def numbers(folder):
    result = dataclasses.asdict(EvalResult.load(folder / "results.json"))
    return {k: v for k, v in result.items() if k not in ("timings", "recipe")}


def validated(folder):
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def averages(folder):
    """{file: bytes} of the averages that are kept."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("*/step_*.safetensors"))}


def losses(folder):
    return [m["loss"] for m in metrics(folder)]


@pytest.fixture(scope="module")
def objective():
    return target_loss_for(task_for(FIELDS))


@pytest.fixture(scope="module")
def pretrained(fields, objective, tmp_path_factory):
    """An encoder that has learned something: from labels, which is the quickest."""
    folder = tmp_path_factory.mktemp("pretrained")
    model = load_model(fields.model)
    network = build_predictor(model, "fields", objective, seed=0, pretrained=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    source = source_of(fields.shards, "train", folder)
    stream = TrainLoader((source,), seed=1, lanes=1, global_batch=16, micro_batch=16)
    for step in stream.steps(0, 30):
        (batch,) = step.batches
        labels = objective.loss_targets(objective.task.label_tensor(batch))
        share, _ = network(batch, labels, torch.tensor([objective.num_terms(labels)], dtype=torch.float64))
        optimizer.zero_grad()
        share.backward()
        optimizer.step()
    model.load_state_dict({k: v for k, v in network.state_dict().items() if "heads" not in k}, strict=False)
    write_model(folder / "model", model.state_dict(), model.config, {"step": 30})
    return folder / "model"


@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_other_decoders_learn(fields, objective, tmp_path, decoder):
    network = build_predictor(load_model(fields.model), "fields", objective, 0, True, decoder)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    source = source_of(fields.shards, "train", tmp_path)
    losses = []
    for step in TrainLoader((source,), seed=1, lanes=1, global_batch=16, micro_batch=16).steps(0, 20):
        (batch,) = step.batches
        labels = objective.loss_targets(objective.task.label_tensor(batch))
        share, _ = network(batch, labels, objective.num_terms(labels)[None])
        optimizer.zero_grad()
        share.backward()
        optimizer.step()
        losses.append(share.item())
    assert losses[-1] < 0.6 * math.log(NUM_CLASSES)
    species = target_loss_for(MultilabelTask(Target("species", "multilabel", ("a", "b"))))
    if decoder == "upernet":
        with pytest.raises(
            EvaluationError, match="upernet predicts maps, and species is a label of the whole tile"
        ):
            build_predictor(load_model(fields.model), "fields", species, 0, True, decoder)


@pytest.fixture(scope="module")
def alone(fields, pretrained, tmp_path_factory):
    """Finetuning and scratch on half of the labels, on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    modes = ["--mode=finetune", "--mode=scratch", "--fraction=0.5", "--maps"]
    output = evaluated(fields, folder, folder / "out", f"--checkpoint={pretrained}", *modes)
    assert "finetune: mIoU" in output
    return folder / "out"


@pytest.mark.slow
def test_finetuning_learns_and_does_better_than_from_scratch(alone):
    tuned, scratch = alone / "finetune_50pct", alone / "scratch_50pct"
    constant = math.log(NUM_CLASSES)
    assert losses(tuned)[-1] < 0.3 * constant
    assert sum(losses(tuned)) < 0.8 * sum(losses(scratch))
    assert validated(tuned)[0]["score"] > validated(scratch)[0]["score"]
    assert numbers(tuned)["value"] > 0.9
    assert (numbers(tuned)["mode"], numbers(tuned)["checkpoint_step"]) == ("finetune", 30)
    assert (numbers(scratch)["mode"], numbers(scratch)["checkpoint_step"]) == ("scratch", 0)
    assert numbers(tuned)["fraction"] == 0.5
    # The counts of both are of the same tiles, and give their scores.
    runs = [load_runs(p / "results.json", EvalResult.load(p / "results.json")) for p in (tuned, scratch)]
    found = difference(*runs)
    assert found.value == pytest.approx(numbers(tuned)["value"] - numbers(scratch)["value"])
    assert (found.pairs_tiles, found.num_tiles) == (True, SPLITS["test"])
    assert runs[0][0].counts.array.dtype == np.uint8
    with np.load(tuned / "maps.npz") as maps:
        assert maps["answer"].shape == maps["truth"].shape == (4, 6, 6)
        counted = maps["truth"] < NUM_CLASSES
        assert (maps["answer"] == maps["truth"])[counted].mean() > 0.9
    written = sorted((tuned / "maps").glob("field-*.tif"))
    assert len(written) == SPLITS["test"]
    agree = []
    for path in written:
        with rasterio.open(path) as image:
            cover = field_tile(int(path.stem[-3:])).targets["cover"]
            agree.append((image.read(1) == cover)[np.isin(cover, (0, 2, 3))].mean())
    assert np.mean(agree) > 0.9


@pytest.fixture(scope="module")
def exported(alone, tmp_path_factory):
    """The export of the finetuning in ``alone``."""
    return export_run(alone / "finetune_50pct", tmp_path_factory.mktemp("exported") / "model")


@pytest.mark.slow
def test_an_export_knows_what_it_predicts(alone, exported):
    model = load_model(exported)
    known, result = model.finetuned, numbers(alone / "finetune_50pct")
    assert (known.target, known.metric, known.mode) == ("cover", "miou", "finetune")
    assert (known.test, known.trained_on) == (result["value"], result["trained_on"])
    assert known.overlap == 0.25
    assert (known.step, known.validation) == (result["chosen"]["step"], result["chosen"]["validation"])
    assert known.spec.sensors == FIELDS.sensors
    assert known.spec.crop_m == FIELDS.crop_m
    assert model.config.heads == FIELDS.targets
    assert not model.decoders
    trained = json.loads((exported / "config.json").read_text())["trained"]
    assert (trained["step"], trained["datasets"]) == (known.step, result["datasets"])
    other = dataclasses.replace(FIELDS.targets[0], ignored=(1,))
    with pytest.raises(EvaluationError, match="cover has other classes"):
        check_target(known, other, "fields")


@pytest.mark.slow
def test_an_export_predicts_the_maps_of_the_evaluation_with_torch_alone(alone, exported, tmp_path):
    tile = field_tile(SPLITS["train"] + SPLITS["val"])
    with rasterio.open(alone / "finetune_50pct" / "maps" / f"{tile.key}.tif") as image:
        expected = image.read(1)
    np.savez(
        tmp_path / "tile.npz",
        **tile.arrays,
        **{f"{k}.dates": v for k, v in tile.dates.items()},
        ref=tile.ref_date,
    )
    program = (
        "import sys, numpy as np\nfrom maestro_scale import load_model\nfrom maestro_scale.datasets.spec import Tile\n"
        f"t = np.load({str(tmp_path / 'tile.npz')!r})\nnames = ('aerial', 's2')\n"
        "tile = Tile('a', {n: t[n] for n in names}, {n: t[n + '.dates'] for n in names}, {}, {}, t['ref'])\n"
        f"found = load_model({str(exported)!r}).predict(tile)\n"
        "print([m for m in ('deepspeed', 'mlflow', 'pydantic', 'webdataset', 'sklearn') if m in sys.modules])\n"
        "print(found.kind, found.classes, tuple(found.probabilities.shape))\n"
        "print(found.values[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    modules, what, values = done.stdout.splitlines()
    assert modules == "[]"
    assert what == "segmentation {0: 'wood', 2: 'meadow', 3: 'lake'} (1, 3, 6, 6)"
    assert json.loads(values) == expected.tolist()


@pytest.mark.slow
def test_mode_test_repeats_the_score(fields, alone, exported, tmp_path):
    expected = numbers(alone / "finetune_50pct")
    # Another crop in the recipe: the model's own counts.
    args = [f"--checkpoint={alone / 'finetune_50pct'}", "--mode=test"]
    output = evaluated(fields, tmp_path, tmp_path / "out", *args, course=["data.mixture[0].crop_m=60"])
    assert "test: mIoU" in output
    found = numbers(tmp_path / "out" / "test")
    same = (
        "value",
        "interval",
        "per_class",
        "confusion",
        "scores",
        "num_tiles",
        "counts_sha256",
        "trained_on",
        "chosen",
    )
    assert {k: found[k] for k in same} == {k: expected[k] for k in same}
    assert (found["mode"], found["checkpoint_step"]) == ("test", expected["chosen"]["step"])
    assert load_encoder(alone / "finetune_50pct")[0].finetuned == load_model(exported).finetuned


def test_a_finetuning_that_has_not_ended_has_nothing_to_export(tmp_path):
    (tmp_path / "validation.jsonl").touch()
    with pytest.raises(ExportError, match="has not ended, or one of an earlier revision or of a baseline"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "finetuned.json").write_text('{"format_version": 1, "weights": "../x"}')
    with pytest.raises(ExportError, match=r"finetuned\.json: .*is missing.* again to write it"):
        export_run(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_two_seeds_are_two_runs_and_their_mean(fields, pretrained, tmp_path):
    args = [f"--checkpoint={pretrained}", "--mode=finetune", "--seeds=0,1"]
    output = evaluated(fields, tmp_path, tmp_path / "out", *args, course=["train.steps=4"])
    runs = [tmp_path / "out" / "finetune" / f"seed_{seed}" for seed in (0, 1)]
    assert losses(runs[0]) != losses(runs[1])
    mean = numbers(tmp_path / "out" / "finetune")
    assert mean["value"] == pytest.approx(sum(numbers(r)["value"] for r in runs) / 2)
    assert (mean["seeds"], mean["splits"]["test"]) == ((0, 1), ("test",))
    assert [r["path"] for r in mean["runs"]] == ["seed_0/results.json", "seed_1/results.json"]
    low, high = mean["interval"]
    spread = (
        f"± {100 * mean['deviation']:.1f}" if mean["deviation"] else f"({100 * low:.1f}-{100 * high:.1f})"
    )
    assert f"finetune: mIoU {100 * mean['value']:.1f} {spread} over 2 seeds" in output


@pytest.mark.slow
def test_two_ranks_killed_and_started_again_give_the_same_bits(fields, pretrained, alone, tmp_path):
    args = [f"--checkpoint={pretrained}", "--mode=finetune", "--fraction=0.5"]
    evaluated(fields, tmp_path, tmp_path / "uninterrupted", *args, ranks=2)
    uninterrupted = tmp_path / "uninterrupted" / "finetune_50pct"
    trainer = Trainer(fields.recipe(tmp_path), entry=EVALUATE)
    job = trainer.start(None, 2, *command(tmp_path / "killed", *args))
    killed, deadline = tmp_path / "killed" / "finetune_50pct", time.monotonic() + 120
    while not any(m["step"] >= 8 for m in metrics(killed)):
        assert time.monotonic() < deadline, job.output[-4000:]
        time.sleep(0.005)
    job.kill()
    assert not (killed / "results.json").exists()
    evaluated(fields, tmp_path, tmp_path / "killed", *args, ranks=2)
    assert losses(killed) == losses(uninterrupted)
    assert (killed / "validation.jsonl").read_text() == (uninterrupted / "validation.jsonl").read_text()
    assert numbers(killed) == numbers(uninterrupted)
    assert averages(killed) == averages(uninterrupted)
    # However it is cut into ranks, the loss is that of the global batch.
    assert losses(uninterrupted)[:4] == pytest.approx(losses(alone / "finetune_50pct")[:4], rel=1e-4)


@pytest.mark.slow
def test_it_stops_on_request_and_ends_early_without_improvement(fields, tmp_path):
    course = ["evaluation.patience=2", "optim.base_lr=1e-12"]
    args = [f"--checkpoint={fields.model}", "--mode=finetune"]
    folder = tmp_path / "out" / "finetune"
    folder.mkdir(parents=True)
    (folder / "STOP").touch()
    output = evaluated(fields, tmp_path, tmp_path / "out", *args, "--mode=scratch", course=course)
    assert f"{folder}: stopped; resume with the same command" in output
    assert (len(losses(folder)), (folder / "results.json").exists()) == (1, False)
    assert not (tmp_path / "out" / "scratch").exists(), "what was to come after began"
    evaluated(fields, tmp_path, tmp_path / "out", *args, course=course)
    assert [v["step"] for v in validated(folder)] == [2, 4, 6]
    assert len(losses(folder)) == 6
    assert numbers(folder)["chosen"] == {"step": 2.0, "validation": validated(folder)[0]["score"]}
    assert [p.stem for p in (folder / "best").iterdir()] == ["step_00000002"]


@pytest.mark.slow
def test_only_the_limit_of_evaluations_skips_steps(fields, tmp_path):
    """From the 101st step on, where every step exceeds the limit."""
    course = ["train.steps=104", "train.global_batch=2", "train.micro_batch=2", "evaluation.validations=1"]
    args = [f"--checkpoint={fields.model}", "--mode=finetune"]
    evaluated(fields, tmp_path, tmp_path / "default", *args, course=[*course, "train.spike=1e-6"])
    folder = tmp_path / "default" / "finetune"
    assert [m["step"] for m in metrics(folder)][-1] == 104
    assert metrics(folder)[-1]["skipped_steps"] == 0

    trainer = Trainer(fields.recipe(tmp_path), entry=EVALUATE)
    limited = [*course, "evaluation.spike=1e-6", "train.spike=0"]
    code, output = trainer.run(None, 1, *command(tmp_path / "limited", *args, course=limited))
    assert code == 2, output[-4000:]
    assert "3 steps in a row were skipped" in output
    assert metrics(tmp_path / "limited" / "finetune")[-1]["step"] == 103


def test_a_baseline_without_weights_is_not_finetuned(fields, tmp_path, capsys):
    recipe = f"--recipe={fields.recipe(tmp_path)}"
    assert evaluate([recipe, f"--out={tmp_path}", "--baseline=statistics", "--mode=finetune"]) == 2
    assert (
        "--baseline statistics is not trained here: use --mode knn, probe or attentive"
        in capsys.readouterr().err
    )


def test_right_logits_have_no_error_and_count_on_the_diagonal(fields, objective, tmp_path):
    loader = EvalLoader(source_of(fields.shards, "val", tmp_path), 2 * objective.num_crops)
    for batch in loader:
        labels = torch.from_numpy(objective.task.labels(batch)).long()
        known = labels.clamp_max(NUM_CLASSES) % NUM_CLASSES
        logits = 50 * torch.nn.functional.one_hot(known, NUM_CLASSES).permute(0, 3, 1, 2).float()
        targets = objective.loss_targets(objective.task.label_tensor(batch))
        assert objective.num_terms(targets) == int((labels < NUM_CLASSES).sum())
        assert float(objective.loss_sum(logits, targets)) == pytest.approx(0, abs=1e-3)
        tiles = objective.per_tile(objective.predict(logits).numpy(), objective.task.labels(batch))
        assert tiles.shape == (len(batch) // objective.num_crops, *objective.tile_shape)
        answer = objective.predictions(tiles)
        assert objective.task.statistic(answer.counts.sum(0)) == 1
        assert answer.counts[:, :NUM_CLASSES].sum() < 36 * len(tiles)
        wrong = objective.predictions(
            objective.per_tile(
                objective.predict(logits.roll(1, dims=1)).numpy(), objective.task.labels(batch)
            )
        )
        assert objective.task.statistic(wrong.counts.sum(0)) == 0


def test_multilabel_error_is_binary_cross_entropy_and_one_half_decides():
    presence = MultilabelLoss(MultilabelTask(Target("kind", "multilabel", ("a", "b", "c"), threshold=0.5)))
    batch = noise_batch(small_config(), 2)
    batch.targets["kind"] = torch.tensor([[0.9, 0.1, 0.6], [0.5, 0.7, 0.0]])
    logits = torch.tensor([[2.0, -1.0, 0.7], [0.0, 3.0, -4.0]])
    labels = presence.loss_targets(presence.task.label_tensor(batch))
    assert labels.tolist() == [[True, False, True], [False, True, False]]
    expected = sum(math.log1p(math.exp(x)) for x in (-2.0, -1.0, -0.7, 0.0, -3.0, -4.0))
    assert float(presence.loss_sum(logits, labels)) == pytest.approx(expected, rel=1e-5)
    assert presence.num_terms(labels) == 6
    rolled = presence.predict(logits.roll(1, dims=0)).numpy()
    answer = presence.predictions(presence.per_tile(rolled, presence.task.labels(batch)).astype(float))
    assert answer.counts[:, :, 0].tolist() == [[False, False, True], [False, True, False]]
    tiles = presence.per_tile(presence.predict(logits).numpy(), presence.task.labels(batch))
    assert presence.predictions(tiles).scores["mean_average_precision"] == 1


def test_the_loss_of_a_batch_is_that_of_its_parts(fields, objective, tmp_path):
    network = build_predictor(load_model(fields.model), "fields", objective, seed=0, pretrained=False)
    (batch,) = EvalLoader(source_of(fields.shards, "val", tmp_path), 64, crops=2)
    labels = objective.loss_targets(objective.task.label_tensor(batch))
    counts = torch.tensor([objective.num_terms(labels)], dtype=torch.float64)
    with torch.no_grad():
        whole, sums = network(batch, labels, counts)
        halves = [(batch.map(lambda t, r=r: t[r]), labels[r]) for r in (slice(5), slice(5, None))]
        parts = [network(*half, counts) for half in halves]
    assert float(sum(share for share, _ in parts)) == pytest.approx(float(whole), rel=1e-5)
    assert float(sums) == pytest.approx(float(whole) * float(counts), rel=1e-5)


def test_scratch_shares_nothing_with_the_encoder_and_neither_has_a_decoder(fields, objective):
    encoder = load_model(fields.model)
    tuned, scratch = (
        build_predictor(encoder, "fields", objective, 5, pretrained) for pretrained in (True, False)
    )
    state = encoder.state_dict()
    for name, tensor in tuned.state_dict().items():
        assert not name.startswith(("decoders", "to_pixels", "to_decoder", "mask_token"))
        assert name.startswith("heads.") or torch.equal(tensor, state[name])
    matrices = [n for n, p in scratch.named_parameters() if p.dim() > 1 and not n.startswith("heads.")]
    assert matrices
    assert not any(torch.equal(scratch.state_dict()[n], state[n]) for n in matrices)


def test_lower_layers_learn_slower(fields, objective):
    network = build_predictor(load_model(fields.model), "fields", objective, 0, True)
    optimizer = build_optimizer(network, 2.0, (0.9, 0.99), 1e-8, 0.1, layer_decay=0.5)
    assert set_lr(optimizer, 0.5) == 1.0
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    named = {name: rates[id(p)] for name, p in network.named_parameters()}
    assert {r for n, r in named.items() if n.startswith("heads.")} == {1.0}
    # Two blocks of the encoders lie below one over all groups.
    assert {r for n, r in named.items() if n.startswith("inter.blocks.0.")} == {0.5}
    assert {r for n, r in named.items() if n.startswith("encoders.s2.blocks.1.")} == {0.25}
    assert {r for n, r in named.items() if n.startswith("encoders.s2.blocks.0.")} == {0.125}
    assert {r for n, r in named.items() if n.startswith("patch_embed.")} == {0.0625}


@pytest.mark.parametrize(
    ("scores", "patience", "over"),
    [
        ([], 2, False),
        ([0.3, 0.2], 2, False),
        ([0.3, 0.2, 0.3], 2, True),
        ([0.3, 0.2, 0.4], 2, False),
        ([0.3, 0.2, 0.1, 0.1], 0, False),
    ],
)
def test_patience_counts_validations_without_a_better_score(scores, patience, over):
    history = [ValidationScore(10 * i, s) for i, s in enumerate(scores)]
    assert early_stop.exhausted(history, patience) is over
    if scores:
        assert early_stop.best(history).score == max(scores)
        assert early_stop.best(history).step == 10 * scores.index(max(scores))


@pytest.mark.parametrize(("num_steps", "validations"), [(1, 20), (7, 3), (100, 20), (101, 20), (5, 1)])
def test_validations_are_spread_evenly_and_include_the_end(num_steps, validations):
    due = [s for s in range(1, num_steps + 1) if early_stop.due(s, num_steps, validations)]
    assert due[-1] == num_steps
    assert len(due) <= validations
    assert len(set(np.diff([0, *due[:-1]]).tolist())) <= 1


def test_only_the_weights_that_were_validated_are_tested(tmp_path, monkeypatch):
    network = torch.nn.Linear(3, 2)
    network.config = SimpleNamespace(to_dict=dict)
    task = SimpleNamespace(
        metric="miou", total=lambda counts: counts.sum(0), statistic=lambda counts: counts[0] / 10
    )
    network.target_loss = SimpleNamespace(task=task)
    ema = SimpleNamespace(gather_into=lambda *args: torch.nn.init.normal_(network.weight))
    world = SimpleNamespace(is_main=True)
    settings = validation.ValidationSettings(validations=3, patience=0, workers=0, precision="fp32")
    hook = validation.ValidationHook(network, ema, None, world, tmp_path, settings, lambda step: None)
    hook.on_start(Position(), 3)
    scores = iter((4, 7, 5))
    monkeypatch.setattr(
        validation, "predict_split", lambda *a, **k: SimpleNamespace(counts=np.array([[next(scores)]]))
    )
    for step in (1, 2, 3):
        hook.after_step(SimpleNamespace(position=SimpleNamespace(step=step), metrics={}))
        hook.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    last = network.weight.clone()
    assert hook.load_best() is network
    assert not torch.equal(network.weight, last)
    best = tmp_path / "best" / "step_00000002.safetensors"
    other = tmp_path / "best" / "step_00000001.safetensors"
    other.replace(best)
    with pytest.raises(
        EvaluationError, match=r"are not the weights that were validated; remove .* and finetune again"
    ):
        hook.load_best()
    best.unlink()
    with pytest.raises(EvaluationError, match=r"cannot be loaded .*No such file"):
        hook.load_best()
    hook.history = [ValidationScore(2, 0.7)]  # of an earlier revision
    torch.save({}, best)
    with pytest.raises(EvaluationError, match=r"cannot be loaded .*not a valid safetensors file"):
        hook.load_best()


def test_a_run_that_went_on_after_its_patience_is_not_resumed_with_it(tmp_path):
    history = [ValidationScore(10 * i, s) for i, s in enumerate((0.5, 0.4, 0.3, 0.9), 1)]
    state = {"history": [dataclasses.asdict(score) for score in history]}
    task = SimpleNamespace(target_loss=SimpleNamespace(task=SimpleNamespace(metric="miou")))

    def load(patience: int, scores: int) -> list[ValidationScore]:
        settings = validation.ValidationSettings(
            validations=4, patience=patience, workers=0, precision="fp32"
        )
        world = SimpleNamespace(is_main=True)
        hook = validation.ValidationHook(task, None, None, world, tmp_path, settings, lambda step: None)
        hook.load_state_dict({"history": state["history"][:scores]})
        return hook.history

    assert load(0, 4) == load(3, 4) == history
    assert load(2, 3) == history[:3]  # it ended there
    with pytest.raises(
        EvaluationError, match=r"patience=2 ends this run at step 30, and it was trained to step 40"
    ):
        load(2, 4)
    with pytest.raises(
        EvaluationError, match=r"patience=1 ends this run at step 20, and it was trained to step 30"
    ):
        load(1, 3)


def test_validations_by_hand():
    def due(num_steps: int, validations: int) -> list[int]:
        return [s for s in range(1, num_steps + 1) if early_stop.due(s, num_steps, validations)]

    assert due(10, 3) == [4, 8, 10]
    assert due(9, 3) == [3, 6, 9]
    assert due(3, 20) == [1, 2, 3]
    assert due(5, 1) == [5]


def test_patience_counts_from_the_first_of_the_best():
    history = [ValidationScore(10 * i, s) for i, s in enumerate((0.1, 0.5, 0.4, 0.5, 0.5))]
    assert early_stop.best(history) == ValidationScore(10, 0.5)
    # Three scores follow the best one.
    assert [early_stop.exhausted(history, patience) for patience in (1, 3, 4)] == [True, True, False]
    assert not early_stop.exhausted(history[:2], 1)


@pytest.mark.slow
def test_a_signal_while_one_seed_is_tested_stops_the_next(fields, tmp_path):
    entry = REPO / "tests" / "testkit" / "signalled_in_test.py"
    args = [f"--checkpoint={fields.model}", "--mode=finetune", "--seeds=0,1"]
    trainer = Trainer(fields.recipe(tmp_path), entry=entry)
    code, output = trainer.run(None, 1, *command(tmp_path / "out", *args, course=["train.steps=4"]))
    assert code == 0, output[-4000:]
    first, second = (tmp_path / "out" / "finetune" / f"seed_{seed}" for seed in (0, 1))
    assert f"{second}: stopped; resume with the same command" in output
    assert (len(losses(first)), (first / "results.json").exists()) == (4, True)
    assert (len(losses(second)), (second / "results.json").exists()) == (1, False)
