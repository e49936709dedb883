"""``train.micro_batch: auto`` of a finetuning."""

from __future__ import annotations

import pytest
import torch
from testkit.models import small_config
from testkit.runs import REPO

from maestro_scale import datasets
from maestro_scale.evaluation.finetune import setup
from maestro_scale.evaluation.finetune.setup import Finetuning
from maestro_scale.recipe import RecipeError, load_recipe
from maestro_scale.training.distributed import World


@pytest.fixture
def finetuning(monkeypatch) -> Finetuning:
    monkeypatch.setenv("MAESTRO_DATA", "data")
    found = object.__new__(Finetuning)  # without shards
    changes = ["train.micro_batch=auto", "evaluation.ema=0.9", "train.global_batch=96"]
    found._recipe = load_recipe(str(REPO / "recipes" / "eval" / "treesatai_ts.yaml"), changes)
    found._spec = datasets.spec("treesatai_ts")
    found._world = World(0, 1, 0, torch.device("cpu"))
    return found


def test_it_is_chosen_by_the_memory_of_a_step_without_masks(finetuning, monkeypatch):
    seen = []

    def choose(recipe, world, estimate):
        seen.append((recipe.masking.ratio, recipe.optim.ema))
        seen.append([estimate(recipe.with_micro_batch(n)).activations for n in (1, 2)])
        return 12

    monkeypatch.setattr(setup, "micro_batch_of", choose)
    assert finetuning._micro_batch(small_config()) == 12
    (about, (one, two)) = seen
    assert about == (0.0, 0.9)
    assert 0 < one < two


def test_of_another_encoder_it_must_be_given(finetuning):
    with pytest.raises(
        RecipeError, match=r"give a number of samples, for example --set train.micro_batch=8$"
    ):
        finetuning._micro_batch(object())
    finetuning._recipe = finetuning._recipe.with_micro_batch(3)
    assert finetuning._micro_batch(object()) == 3
