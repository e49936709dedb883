"""``train.micro_batch: auto``: the largest micro-batch that divides a rank's share and fits, equal on all ranks."""

from __future__ import annotations

import json

import pytest
import torch
from testkit.runs import REPO, Trainer, curve, metrics, write_recipe

from maestro_scale.recipe import RecipeError, load_recipe
from maestro_scale.training.distributed import World
from maestro_scale.training.footprint import Footprint
from maestro_scale.training.memory import StepMemory
from maestro_scale.training.micro_batch import device_memory, largest_micro_batch, micro_batch_of

GIB = 2**30


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setenv("MAESTRO_DATA", "/nowhere")
    return load_recipe(REPO / "recipes" / "vitb.yaml", ["train.micro_batch=auto"])


def estimate(recipe) -> StepMemory:
    """10 GiB of weights and 2 GiB per sample."""
    return StepMemory(Footprint(10 * GIB, 0, 0, 0, 0), 2 * GIB * recipe.train.samples_per_micro_batch, 0)


@pytest.mark.parametrize(
    ("world_size", "gib", "expected"),
    [
        (4, 80, 24),  # a share of 24 takes 58 of 72 GiB
        (4, 60, 12),  # 90 % are 54 GiB, so up to 22 samples; 12 is the largest divisor of 24 below
        (4, 24, 4),  # 21.6 GiB, so up to 5 samples
        (2, 60, 16),  # a share of 48
        (32, 60, 3),  # all of the share
    ],
)
def test_the_largest_divisor_of_the_share_that_fits_is_chosen(recipe, world_size, gib, expected):
    assert largest_micro_batch(recipe, world_size, gib * GIB, estimate)[0] == expected


def test_an_error_says_what_needs_less_memory(recipe):
    with pytest.raises(
        RecipeError, match=r"micro-batch of 1 takes an estimated 12\.0 GiB .* 90% .* 9\.0 GiB.*checkpointing"
    ):
        largest_micro_batch(recipe, 4, 10 * GIB, estimate)


class FakeWorld(World):
    """Rank 0 of two, whose other rank has less memory."""

    def maxima(self, values):
        return [max(values[0], -60.0 * GIB)]

    def gather(self, value):
        return [value, "another host"]


def test_all_ranks_take_the_micro_batch_of_the_smallest_memory(recipe, monkeypatch):
    world = FakeWorld(0, 4, 0, torch.device("cpu"))
    monkeypatch.setattr("maestro_scale.training.micro_batch._machine_memory", lambda: 1000 * GIB)
    assert device_memory(world) == 1000 * GIB
    assert micro_batch_of(recipe, world, estimate) == 12
    assert micro_batch_of(recipe.with_micro_batch(8), world, estimate) == 8


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("maestro_scale.training.micro_batch._machine_memory", lambda: 1000 * GIB)
    monkeypatch.setattr(FakeWorld, "gather", lambda self, value: [value] * 4)
    assert device_memory(FakeWorld(0, 4, 0, torch.device("cpu"))) == 250 * GIB


def test_the_memory_of_a_gpu_is_that_of_its_driver(recipe, monkeypatch):
    world = FakeWorld(0, 4, 0, torch.device("cuda", 0))
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 60 * GIB))
        assert device_memory(world) == 60 * GIB
        assert micro_batch_of(recipe, world, estimate) == 12
    monkeypatch.setattr("maestro_scale.training.micro_batch.total_memory_bytes", lambda device: None)
    with pytest.raises(RecipeError, match="memory of cuda:0 is not known: give a number"):
        device_memory(world)


@pytest.mark.slow
def test_a_run_chooses_its_micro_batch_and_records_it(synthetic_shards, tmp_path):
    trainer = Trainer(write_recipe(tmp_path, synthetic_shards, workers=0))
    fixed = trainer.train(tmp_path / "fixed", 2, "--set", "train.micro_batch=2")
    code, output = trainer.run(tmp_path / "auto", 2, "--set", "train.micro_batch=auto")
    assert code == 0, output
    # The small model fits with the whole share of a rank, 8 samples on 2 ranks.
    assert output.count("train.micro_batch auto: 4 of 4 samples per rank") == 1
    assert json.loads((tmp_path / "auto" / "environment.json").read_text())["micro_batch"] == 4
    assert load_recipe(tmp_path / "auto" / "recipe.yaml").train.micro_batch == "auto"
    assert curve(metrics(tmp_path / "auto")) == pytest.approx(curve(fixed), rel=1e-5)
