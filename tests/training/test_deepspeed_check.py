"""Settings that DeepSpeed refuses give one line with key and value, before anything starts."""

from __future__ import annotations

import pytest

from maestro_scale.recipe import RecipeError, load_recipe
from maestro_scale.training.deepspeed_check import check_deepspeed
from tests.testkit.runs import REPO

RECIPE = REPO / "recipes" / "vitt.yaml"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_accepts_the_sections_of_shipped_recipes(stage):
    check_deepspeed(
        load_recipe(RECIPE, [f"deepspeed.zero_optimization.stage={stage}"]).deepspeed_config(1, "cpu")
    )


def test_deepspeed_accepts_auto_while_the_micro_batch_is_not_known():
    auto = ["train_micro_batch_size_per_gpu=auto", "gradient_accumulation_steps=auto"]
    recipe = load_recipe(RECIPE, ["train.micro_batch=auto", *(f"deepspeed.{key}" for key in auto)])
    check_deepspeed(recipe.deepspeed_config(1, "cpu"))
    assert recipe.with_micro_batch(8).deepspeed_config(1, "cpu")["train_micro_batch_size_per_gpu"] == 8


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("zero_optimization.overlap_com=true", "deepspeed.zero_optimization.overlap_com: True: extra inputs"),
        (
            "zero_optimization.reduce_bucket_size=-1",
            "deepspeed.zero_optimization.reduce_bucket_size: -1: input",
        ),
        (
            "zero_optimization.offload_optimizer.device=disk",
            "deepspeed.zero_optimization.offload_optimizer.device: 'disk': input should be 'none', 'cpu' or 'nvme'",
        ),
        ("comet.secret_token=planted", "deepspeed.comet.secret_token: '(hidden)': extra inputs"),
        ("checkpoint.tag_validation=foo", "deepspeed"),
        ("data_types.keep_in_fp32_modules=3", "deepspeed"),
        ("comet.enabeld=true", "deepspeed.comet.enabeld: True: extra inputs"),
    ],
)
def test_invalid_keys_and_values_are_named(message, line):
    config = load_recipe(RECIPE, [f"deepspeed.{message}"]).deepspeed_config(1, "cpu")
    with pytest.raises(RecipeError) as raised:
        check_deepspeed(config)
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)
