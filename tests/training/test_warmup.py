"""The rehearsal step: results do not depend on it, and a lack of memory is reported before the run starts."""

from __future__ import annotations

import pytest
import torch
from testkit.launch import launch, task
from testkit.runs import Trainer, curve, write_recipe

from maestro_scale.recipe import load_recipe
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.mock import mock_batch
from maestro_scale.training.pretrain import open_datasets


@pytest.fixture(scope="module")
def trainer(synthetic_shards, tmp_path_factory) -> Trainer:
    return Trainer(write_recipe(tmp_path_factory.mktemp("recipe"), synthetic_shards, workers=0))


@pytest.mark.slow
def test_the_rehearsal_leaves_weights_moments_averages_guard_and_random_state_bitwise_equal(tmp_path):
    """In every stage, on two ranks, with accumulation; and in bf16."""
    variants = [(stage, "fp32") for stage in range(4)] + [(stage, "bf16") for stage in range(4)]
    variants += [(1, "bf16_weights"), (3, "bf16_weights")]
    tasks = [
        task(
            stage,
            f"{stage}-{precision}-{rehearsed}",
            3,
            accumulate=2,
            precision=precision,
            rehearse=rehearsed,
        )
        for stage, precision in variants
        for rehearsed in (False, True)
    ]
    found = launch(tmp_path, 2, tasks)
    for stage, precision in variants:
        without, rehearsed = (found[f"{stage}-{precision}-{r}"] for r in (False, True))
        assert "error" not in without
        assert without == rehearsed, (stage, precision)


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_rehearsal(trainer, tmp_path):
    """Runs killed and resumed with it equal uninterrupted ones elsewhere: it is on unless switched off."""
    curves = [
        curve(trainer.train(tmp_path / check, 1, "--set", f"train.warmup_check={check}", "optim.ema=0.9"))
        for check in ("true", "false")
    ]
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_step_that_does_not_fit_ends_with_one_line(tmp_path):
    big = task(2, "big", steps=1, rehearse=True, size=4000, room_mb=400)
    message = launch(tmp_path, 1, [big])["big"]["error"]
    assert message.startswith("out of memory on rank 0 on ")
    assert "micro-batches of 4000 samples of test" in message
    assert "train.micro_batch" in message
    assert "\n" not in message


def test_mock_batches_are_like_real_ones(trainer):
    recipe = load_recipe(trainer.recipe)
    source = open_datasets(recipe)[0].source
    loader = TrainLoader((source,), recipe.seed, 4, 8, 4, 0, 1, workers=0, window=8)
    real = next(loader.steps(0, 1)).batches[0]
    loader.close()
    state = torch.get_rng_state()
    mock = mock_batch(source, real.dataset, 4)
    assert torch.equal(state, torch.get_rng_state())
    assert mock.dataset == real.dataset
    assert len(mock) == len(real)
    for part in ("pixels", "dates", "noise", "targets"):
        ours, theirs = getattr(mock, part), getattr(real, part)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.items()
        }
    assert mock.ref_date.shape == real.ref_date.shape
