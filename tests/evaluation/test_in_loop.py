"""``evaluation.every_steps``: scores of the encoder during a pretraining, which they do not change."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from testkit.runs import Trainer, metrics, write_mixture_recipe

from maestro_scale.evaluation.in_loop import InLoopEvaluationHook, _benchmark, _encoder_copy
from maestro_scale.interop.export import full_state
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import build_model_config, load_recipe
from maestro_scale.shards.write.writer import Writer
from maestro_scale.training.checkpoint.folder import newest
from maestro_scale.training.pretrain import open_datasets, used_datasets
from tests.evaluation.conftest import FIELDS, SPLITS, field_tile

SLOW = Path(__file__).parents[1] / "testkit" / "slow_evaluation.py"
SCORES = ("eval/knn", "eval/probe")
SLOW_S = 8
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
# (ranks, ZeRO stage)
ONE, TWO = (1, 0), (2, 3)


def settings(layout: tuple[int, int], every: int, *more: str) -> list[str]:
    common = ["train.steps=7", "optim.ema=0.9", "evaluation.num_crops=16"]
    return [
        "--set", *common, f"deepspeed.zero_optimization.stage={layout[1]}", f"evaluation.every_steps={every}", *more
    ]  # fmt: skip


@pytest.fixture(scope="module")
def mixture(synthetic_shards, tmp_path_factory) -> Path:
    return write_mixture_recipe(tmp_path_factory.mktemp("recipe"), synthetic_shards)


@pytest.fixture(scope="module")
def evaluated(mixture, tmp_path_factory) -> dict[tuple[int, int], Path]:
    """By layout, the directory of a run that is scored every 3 steps."""
    found = {}
    for layout in (ONE, TWO):
        found[layout] = tmp_path_factory.mktemp("evaluated") / "run"
        Trainer(mixture).train(found[layout], layout[0], *settings(layout, 3))
    return found


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = newest(run_dir) / "state"
    return {f"{kind} {name}": t for kind in KINDS for name, t in full_state(folder, kind).items()}


def assert_same_training(run_dir: Path, other: Path) -> None:
    """Bitwise: every loss and gradient norm, and the final weights, moments and averages."""
    names = ("step", "dataset", "loss", "lr", "grad_norm", "skipped_steps")
    lines, others = ([{k: m[k] for k in names} for m in metrics(d)] for d in (run_dir, other))
    assert lines == others
    assert len(lines) == 7
    tensors, others = state(run_dir), state(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def scores(run_dir: Path) -> dict[int, dict[str, float]]:
    """The scores by step."""
    return {m["step"]: {k: m[k] for k in SCORES} for m in metrics(run_dir) if SCORES[0] in m}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ONE, TWO])
def test_a_mixture_trains_bitwise_as_without_it(mixture, evaluated, tmp_path, layout):
    Trainer(mixture).train(tmp_path / "run", layout[0], *settings(layout, 0))
    assert_same_training(evaluated[layout], tmp_path / "run")
    assert scores(tmp_path / "run") == {}


@pytest.mark.slow
def test_scores_are_in_the_lines_of_the_due_steps_on_any_number_of_ranks(evaluated):
    for run_dir in evaluated.values():
        for line in metrics(run_dir):
            due = line["step"] in (3, 6)
            assert {k for k in line if k.startswith("eval/")} == ({*SCORES, "eval/delay_s"} if due else set())
            if due:
                assert all(0 <= line[k] <= 1 for k in SCORES)
                assert line["eval/delay_s"] > 0
    one, two = (scores(evaluated[layout]) for layout in (ONE, TWO))
    assert one.keys() == two.keys()
    # Equal up to rounding: the weights of both runs differ by about 1e-6.
    for step, values in one.items():
        assert values == pytest.approx(two[step], abs=1e-6)


@pytest.mark.slow
def test_killed_inside_an_evaluation_and_resumed_it_equals_an_uninterrupted_run(mixture, evaluated, tmp_path):
    run_dir, started = tmp_path / "run", tmp_path / "started"
    env = {"SLOW_STEP": "6", "STARTED": str(started), "SLOW_S": "600"}
    job = Trainer(mixture, env=env, entry=SLOW).start(run_dir, 2, *settings(TWO, 3))
    deadline = time.monotonic() + 240
    while not started.exists():
        assert not any(p.poll() for p in job.processes), job.output[-4000:]
        assert time.monotonic() < deadline, job.output[-4000:]
        time.sleep(0.01)
    job.kill()
    # The line of a step follows its evaluation.
    assert [m["step"] for m in metrics(run_dir)] == [1, 2, 3, 4, 5]
    trainer = Trainer(mixture, env={**env, "SLOW_S": str(SLOW_S)}, entry=SLOW)
    lines = trainer.train(run_dir, 2, *settings(TWO, 3))
    assert_same_training(run_dir, evaluated[TWO])
    assert scores(run_dir) == scores(evaluated[TWO])

    # The speed is that of training: an evaluation's time is in none of its numbers.
    line = lines[5]
    assert line["step"] == 6
    assert line["eval/delay_s"] > SLOW_S
    assert line["step_s"] < SLOW_S
    assert line["samples_per_s"] == pytest.approx(8 / line["step_s"], rel=1e-6)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> Path:
    """Shards of the fields under another name and without labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    spec = dataclasses.replace(FIELDS, name="unlabelled", targets=())
    with Writer(str(folder), spec, "train") as writer:
        for number in range(12):
            writer.add(dataclasses.replace(field_tile(100 + number), targets={}))
    return folder


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    """Shards of labelled fields, with so much noise that no classifier is perfect."""
    folder, first = tmp_path_factory.mktemp("benchmark"), 0
    for split, count in (("train", 12), ("val", 11)):
        with Writer(str(folder), FIELDS, split) as writer:
            for number in range(first, first + count):
                tile, rng = field_tile(number), np.random.default_rng(1000 + number)
                s2 = tile.arrays["s2"] + rng.normal(0, 500, tile.arrays["s2"].shape)
                arrays = {**tile.arrays, "s2": s2.astype(np.int16)}
                writer.add(dataclasses.replace(tile, arrays=arrays))
        first += count
    return folder


@pytest.fixture
def pretraining(unlabelled, tmp_path) -> Path:
    """A recipe that pretrains on the unlabelled fields and is to be scored after its second step."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
name: fields
data:
  mixture: [{{dataset: unlabelled, shards: {str(unlabelled)!r}, split: train}}]
  lanes: 2
  workers: 0
  cache_dir: {str(tmp_path / "cache")!r}
model: {{size: tiny, width: 32, depth: 2, heads: 2, decoder_depth: 1, decoder_width: 32, inter_depth: 1}}
train: {{steps: 2, global_batch: 4, micro_batch: 2, precision: fp32, log_every: 1}}
evaluation: {{every_steps: 2, num_crops: 40}}
tracking: {{enabled: false, pictures_every: 0}}
"""
    )
    return path


@pytest.mark.slow
def test_another_dataset_is_scored_with_the_sensors_that_the_encoder_has(benchmark, pretraining, tmp_path):
    # The benchmark has an aerial image as well, for which this encoder has no weights.
    changes = ["data.mixture[0].sensors={aerial: null}", "model.attention=math", "model.checkpointing=blocks"]
    found = []
    for ranks, stage in (ONE, TWO):
        zero = f"deepspeed.zero_optimization.stage={stage}"
        lines = Trainer(pretraining).train(
            tmp_path / f"run-{ranks}", ranks, "--set", f"evaluation.shards={benchmark}", zero, *changes
        )
        assert [sorted(k for k in line if k.startswith("loss/")) for line in lines] == [["loss/s2"]] * 2
        found.append([lines[1][k] for k in SCORES])
    assert all(0 < score < 1 for score in found[0]), found
    # 40 crops are two batches, of which each of two ranks encodes one.
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def refused(recipe: Path, run_dir: Path, *changes: str) -> str:
    """The only line about an error of a run that must end before its first step."""
    code, output = Trainer(recipe).run(run_dir, 1, "--set", *changes)
    assert code == 2, output[-3000:]
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert metrics(run_dir) == []
    assert not (run_dir / "checkpoints").exists()
    return line


@pytest.mark.slow
def test_no_target_in_the_mixture_is_refused(pretraining, tmp_path):
    line = refused(pretraining, tmp_path / "run", "train.steps=2")
    assert line.startswith("error: evaluation.every_steps: no dataset of data.mixture has a target to score")


@pytest.mark.slow
def test_a_benchmark_without_a_val_split_is_refused(pretraining, tmp_path):
    with Writer(str(tmp_path / "shards"), FIELDS, "train") as writer:
        for number in range(SPLITS["val"]):
            writer.add(field_tile(number))
    line = refused(pretraining, tmp_path / "run", f"evaluation.shards={tmp_path / 'shards'}")
    assert "val" in line
    assert "train" in line


@pytest.mark.slow
def test_shards_that_do_not_exist_are_refused(pretraining, tmp_path):
    line = refused(pretraining, tmp_path / "run", f"evaluation.shards={tmp_path / 'nowhere'}")
    assert f"{tmp_path / 'nowhere'}/manifest.json: not found" in line


def test_the_encoder_copy_computes_in_fp32_with_any_kernel_and_has_no_decoder(mixture):
    recipe = load_recipe(mixture, ["model.attention=flash", "model.checkpointing=blocks"])
    specs = [d.source.spec for d in open_datasets(recipe)]
    model = Maestro(build_model_config(recipe, specs)).initialise(recipe.seed)
    encoder, shared = _encoder_copy(model, specs[0])
    assert (encoder.config.attention, encoder.config.checkpointing) == ("auto", "none")
    state, trained = encoder.state_dict(), model.state_dict()
    assert {n for n, _ in encoder.named_parameters()} == set(shared)
    assert all(torch.equal(state[name], trained[name]) for name in shared)
    assert not any(n.startswith(("decoders", "to_pixels", "to_decoder", "mask_token")) for n in shared)


def test_the_watchdog_knows_that_a_rank_without_a_batch_evaluates():
    # It waits for the other ranks: reported as computing, it would be the one furthest behind, which others wait for.
    notes = []
    engine = SimpleNamespace(sharded=SimpleNamespace(gather_into=lambda *args: None))
    samples = SimpleNamespace(encoder=None, shared=[], encode=lambda split, on_batch: None)
    world = SimpleNamespace(is_main=False, sums=lambda scores: scores)
    watchdog = SimpleNamespace(note=lambda step, doing: notes.append((step, doing)))
    hook = InLoopEvaluationHook(engine, samples, world, watchdog, every=2)
    for number in (1, 2):
        hook.after_step(SimpleNamespace(position=SimpleNamespace(step=number), metrics={}))
    assert notes == [(2, "evaluating")]


def test_other_shards_of_a_dataset_of_the_mixture_are_read_with_its_sensors(
    mixture, synthetic_shards, tmp_path
):
    copy = tmp_path / "copy"
    copy.symlink_to(synthetic_shards)
    recipe = load_recipe(mixture, [f"evaluation.shards={copy}"])
    opened = used_datasets(recipe, open_datasets(recipe))
    assert [d.name for d in opened] == ["treesatai_ts#0", "treesatai_ts#1"]
    dataset, spec = _benchmark(recipe, opened, None)
    assert (dataset.url, dataset.name) == (str(copy), "evaluation.shards (treesatai_ts)")
    assert (spec.sensor("s2").num_dates, spec.sensor("s2").patch) == (4, 2)
