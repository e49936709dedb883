"""One model for several datasets with other sensors and grids, and shared weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from testkit.models import full_batch, small_config
from testkit.runs import Trainer, audit, curve, write_mixture_recipe

from maestro_scale.model.config import DatasetView, ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks


@pytest.fixture(scope="module")
def trainer(synthetic_shards, tmp_path_factory) -> Trainer:
    path = write_mixture_recipe(tmp_path_factory.mktemp("recipe"), synthetic_shards)
    path.write_text(path.read_text().replace("steps: 6", "steps: 9"))
    return Trainer(path)


@pytest.fixture(scope="module")
def uninterrupted(trainer, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return run_dir, trainer.train(run_dir, 1, "--set", "deepspeed.zero_optimization.stage=0")


@pytest.mark.slow
def test_steps_are_distributed_by_weight_and_name_their_dataset(uninterrupted):
    _, lines = uninterrupted
    names = [m["dataset"] for m in lines]
    assert names.count("treesatai_ts#0") == 6
    assert names.count("treesatai_ts#1") == 3
    for m in lines:
        assert ("loss/aerial" in m) == (m["dataset"] == "treesatai_ts#0")
        assert m["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_and_any_stage_give_the_same_curve(trainer, uninterrupted, tmp_path, stage):
    # Steps that leave weights unused (the aerial encoder, here) must move them alike in every stage.
    lines = trainer.train(tmp_path / "run", 2, "--set", f"deepspeed.zero_optimization.stage={stage}")
    assert curve(lines) == pytest.approx(curve(uninterrupted[1]), rel=1e-5)
    assert [m["grad_norm"] for m in lines] == pytest.approx(
        [m["grad_norm"] for m in uninterrupted[1]], rel=1e-3
    )
    assert audit(tmp_path / "run") == audit(uninterrupted[0])


OFFLOADED = "offload_optimizer: {device: cpu}"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "micro_batch"), [(1, 4), (2, 8), (3, 4)])
def test_offload_gives_the_same_curve(trainer, uninterrupted, tmp_path, stage, micro_batch):
    # Under offload, DeepSpeed keeps the gradients of weights that a step leaves unused.
    zero = f"deepspeed.zero_optimization={{stage: {stage}, {OFFLOADED}}}"
    lines = trainer.train(tmp_path / "run", 1, "--set", zero, f"train.micro_batch={micro_batch}")
    assert curve(lines) == pytest.approx(curve(uninterrupted[1]), rel=1e-5)
    assert [m["grad_norm"] for m in lines] == pytest.approx(
        [m["grad_norm"] for m in uninterrupted[1]], rel=1e-3
    )


@pytest.mark.slow
def test_a_killed_mixture_resumes_exactly(trainer, uninterrupted, tmp_path):
    changes = ["--set", "deepspeed.zero_optimization.stage=0"]
    trainer.kill_at(tmp_path / "run", 1, 5, *changes)
    assert curve(trainer.train(tmp_path / "run", 1, *changes)) == curve(uninterrupted[1])


@pytest.mark.slow
def test_each_dataset_is_logged_at_its_own_interval(trainer, tmp_path):
    lines = trainer.train(tmp_path / "run", 1, "--set", "train.log_every=3", "data.workers=0")
    # The 1st and every 3rd of a dataset's own steps, and the last of the run.
    assert [m["dataset"] for m in lines].count("treesatai_ts#0") == 3
    assert [m["dataset"] for m in lines].count("treesatai_ts#1") == 2


@pytest.mark.slow
def test_views_that_cannot_share_weights_are_refused(trainer):
    code, output = trainer.run(None, 1, "--dry-run", "--set", "data.mixture[1].sensors.s2.patch=4")
    assert code == 2
    assert "data.mixture[1].sensors.s2.embed: 's2' is shared with data.mixture[0].sensors.s2" in output
    assert "patch 4 of 10 bands differs from patch 2 of 10 bands" in output


@pytest.mark.slow
def test_dry_run_shows_every_dataset(trainer):
    code, output = trainer.run(None, 1, "--dry-run")
    assert code == 0, output
    assert "treesatai_ts#0" in output
    assert "weight 1 in the mixture" in output


def two_views() -> ModelConfig:
    one = small_config(dataset="one")
    half = tuple(dataclasses.replace(s, image_size=s.image_size * 2, num_dates=1) for s in one.sensors[:2])
    return dataclasses.replace(one, others=(DatasetView("two", half, one.pos_grid * 2),))


def test_a_view_of_a_shared_model_is_the_model_of_that_dataset_alone():
    both = two_views()
    alone = both.for_dataset("two")
    batch = dataclasses.replace(full_batch(alone, 2), dataset="two")
    masks = draw_masks(alone, MaskingConfig(), batch)
    counts = torch.ones(len(alone.sensors), dtype=torch.float64)
    shared, single = Maestro(both).initialise(0), Maestro(alone).initialise(0)
    assert set(single.state_dict()) < set(shared.state_dict())
    with torch.no_grad():
        assert torch.equal(shared(batch, masks, counts)[0], single(batch, masks, counts)[0])


def test_a_model_of_several_datasets_names_those_it_knows():
    both = two_views()
    assert ModelConfig.from_dict(both.to_dict()) == both
    batch = dataclasses.replace(full_batch(both.for_dataset("one"), 1), dataset="three")
    with pytest.raises(KeyError, match="'three'; it has: one, two"):
        Maestro(both).initialise(0).encode(batch)
