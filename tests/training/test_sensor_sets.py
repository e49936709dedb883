"""Training on tiles that lack sensors: exact on two ranks and any ZeRO stage, after a kill, and in each step's loss."""

from __future__ import annotations

import collections
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from testkit.models import full_batch, small_config
from testkit.runs import Trainer, audit, curve, write_recipe

from maestro_scale import datasets
from maestro_scale.datasets.spec import Tile
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks
from maestro_scale.recipe import load_recipe
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.training.dry_run import specs_and_sizes
from maestro_scale.training.objectives import hidden_counts
from maestro_scale.training.stored_data import num_steps

SETS = ((), ("s1_des",), ("s1_asc", "s1_des"))


class Lacking:
    """Synthetic tiles, of which every third lacks one orbit, and every third both."""

    def __init__(self, raw: Path) -> None:
        self._whole = datasets.open_raw("treesatai_ts", raw, "train")
        self.spec = self._whole.spec

    def keys(self) -> list[str]:
        return self._whole.keys()

    def absent(self, key: str) -> tuple[str, ...]:
        return SETS[self.keys().index(key) % 3]

    def read(self, key: str) -> Tile:
        tile, absent = self._whole.read(key), self.absent(key)
        arrays, dates = ({n: a for n, a in d.items() if n not in absent} for d in (tile.arrays, tile.dates))
        return replace(tile, arrays=arrays, dates=dates)


@pytest.fixture(scope="module")
def shards(synthetic_raw, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lacking")
    write_shards(Lacking(synthetic_raw), str(folder), "train", shard_mb=4)
    return folder


@pytest.fixture(scope="module")
def trainer(shards, tmp_path_factory) -> Trainer:
    path = write_recipe(tmp_path_factory.mktemp("recipe"), shards)
    return Trainer(path.rename(path.with_name("lacking.yaml")))


@pytest.fixture(scope="module")
def uninterrupted(trainer, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return run_dir, trainer.train(run_dir, 1, "--set", "deepspeed.zero_optimization.stage=0")


def test_each_step_trains_on_the_sensors_of_its_tiles(uninterrupted):
    _, lines = uninterrupted
    names = ("treesatai_ts", "treesatai_ts~s1_des", "treesatai_ts~s1_asc+s1_des")
    assert collections.Counter(m["dataset"] for m in lines) == dict.fromkeys(names, 2)  # two epochs
    for m in lines:
        has = {name for name in ("s1_asc", "s1_des") if f"loss/{name}" in m}
        assert has == {"s1_asc", "s1_des"} - set(m["dataset"].partition("~")[2].split("+"))
        assert m["loss"] > 0


def test_a_plan_counts_the_steps_of_each_set(uninterrupted):
    recipe = load_recipe(uninterrupted[0] / "recipe.yaml")
    (stored,) = specs_and_sizes(recipe)[1]
    assert stored is not None
    assert len(stored.parts) == 3
    assert sum(stored.parts) == stored.samples
    assert num_steps(recipe, [stored]) == len(uninterrupted[1]) == 6


@pytest.mark.slow
def test_two_ranks_and_stage_3_give_the_same_curve(trainer, uninterrupted, tmp_path):
    lines = trainer.train(tmp_path / "run", 2, "--set", "deepspeed.zero_optimization.stage=3")
    assert curve(lines) == pytest.approx(curve(uninterrupted[1]), rel=1e-5)
    norms = [m["grad_norm"] for m in uninterrupted[1]]
    assert [m["grad_norm"] for m in lines] == pytest.approx(norms, rel=1e-3)
    assert audit(tmp_path / "run") == audit(uninterrupted[0])


def test_a_killed_run_resumes_exactly(trainer, uninterrupted, tmp_path):
    changes = ["--set", "deepspeed.zero_optimization.stage=0"]
    trainer.kill_at(tmp_path / "run", 1, 3, *changes)
    assert curve(trainer.train(tmp_path / "run", 1, *changes)) == curve(uninterrupted[1])
    assert audit(tmp_path / "run") == audit(uninterrupted[0])


def test_dry_run_lists_the_sets_and_their_steps(trainer):
    code, output = trainer.run(None, 1, "--dry-run")
    assert code == 0, output
    lines = [" ".join(line.split()) for line in output.splitlines()]
    # 28 tiles: 10, 9 and 9, in steps of 8.
    for wanted in (
        "treesatai_ts │ 10 │ 1",
        "treesatai_ts~s1_des │ 9 │ 1",
        "treesatai_ts~s1_asc+s1_des │ 9 │ 1",
    ):
        assert f"│ {wanted} │" in lines, output


def test_tiles_without_a_sensor_are_the_model_of_the_other_sensors_alone():
    """The loss of a step, and the gradients, by hand: those of a model that never had the sensor."""
    whole = small_config(dataset="one")
    alone = replace(whole, sensors=tuple(s for s in whole.sensors if s.name not in ("s1_des", "s2")))
    batch = replace(full_batch(alone, 4), dataset="one~s2+s1_des")
    model, single = Maestro(whole).initialise(0), Maestro(alone).initialise(0)
    single.load_state_dict({k: v for k, v in model.state_dict().items() if k in single.state_dict()})
    view = model.view(batch.dataset)
    assert view.sensors == alone.sensors
    masks = draw_masks(view, MaskingConfig(), batch)
    counts = hidden_counts(view, [masks])
    loss, sums = model(batch, masks, counts)
    expected, _ = single(replace(batch, dataset="one"), masks, counts)
    assert torch.equal(loss, expected)
    assert len(sums) == 2 * len(alone.sensors)
    assert torch.equal(model.loss(batch.dataset, sums, counts), single.loss("one", sums, counts))
    loss.backward()
    expected.backward()
    known = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        if name in known:
            assert torch.equal(parameter.grad, known[name].grad), name
        else:
            assert parameter.grad is None, name
    with torch.no_grad():
        assert torch.equal(model.embed(batch).vector, single.embed(replace(batch, dataset="one")).vector)


def test_an_identity_does_not_change_unless_incomplete_tiles_are_left_out(shards, tmp_path):
    from maestro_scale.recipe import build_model_config, load_recipe
    from maestro_scale.training.distributed import World
    from maestro_scale.training.pretrain import identity, open_datasets

    path = write_recipe(tmp_path, shards)
    found = []
    for changes in ([], ["data.mixture[0].incomplete=leave_out"]):
        recipe = load_recipe(str(path), changes)
        opened = open_datasets(recipe)
        config = build_model_config(recipe, [d.source.spec for d in opened])
        found.append(identity(recipe, config, opened, World(0, 1, 0, torch.device("cpu")))["data"])
        found.append(sum(opened[0].source.counts))
    assert "incomplete" not in found[0]
    assert found[2] == {**found[0], "incomplete": ["leave_out"]}
    assert 0 < found[3] < found[1]
    assert json.dumps(found[0])
    assert dataclasses.is_dataclass(opened[0])
