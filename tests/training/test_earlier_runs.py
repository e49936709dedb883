"""Runs of earlier revisions continue with the masks and dates that they began with; settings that came later."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from maestro_scale.recipe import parse_recipe
from maestro_scale.training.checkpoint.identity import differences, with_recorded_draws

MAIN = SimpleNamespace(is_main=True)
EARLIER = {
    "seed": 3,
    "data": {"order": {"lanes": 2}},
    "optim": {"clip": 1.0},
    "train": {"masking": {"ratio": 0.75}},
}
NOW = {
    "seed": 3,
    "data": {"order": {"lanes": 2, "first_date": "ends"}},
    "optim": {"clip": 1.0, "decay": "matrices", "ema_epochs": 0},
    "train": {"masking": {"ratio": 0.75, "structure": True}},
}
TUNED = {"seed": 3, "data": "digest", "optim": {"clip": 1.0}}


def recipe(fusion="group", first_date="auto", structure="auto"):
    mixture = [{"dataset": "toy", "shards": "/x"}]
    model = {"fusion": fusion, "inter_depth": 0}
    data = {"mixture": mixture, "first_date": first_date}
    return parse_recipe({"name": "x", "data": data, "model": model, "masking": {"structure": structure}})


def test_a_checkpoint_without_the_settings_did_what_earlier_revisions_did():
    assert differences(EARLIER, NOW) == ""
    later = {**NOW, "data": {"order": {"lanes": 2, "first_date": "any"}}}
    assert differences(EARLIER, later) == "data.order.first_date: checkpoint 'ends', now 'any'"
    later = {**NOW, "optim": {**NOW["optim"], "decay": "all"}}
    assert differences(EARLIER, later) == "optim.decay: checkpoint 'matrices', now 'all'"
    later = {**NOW, "train": {"masking": {"ratio": 0.75, "structure": False}}}
    assert differences(EARLIER, later) == "train.masking.structure: checkpoint True, now False"
    tuned = {**TUNED, "optim": NOW["optim"], "first_date": "ends", "ema_epochs": 0}
    assert differences(TUNED, tuned) == ""
    assert differences(TUNED, {**tuned, "ema_epochs": 1}) == "ema_epochs: checkpoint 0, now 1"


@pytest.mark.parametrize(
    ("fusion", "structure"), [("group", True), ("mod", True), ("monotemp", False), ("shared", False)]
)
def test_a_new_run_draws_as_the_reference(fusion, structure):
    new = with_recorded_draws(recipe(fusion), None, MAIN)
    assert (new.first_date, new.has_structural_masks) == ("any", structure)


@pytest.mark.parametrize("fusion", ["group", "mod", "monotemp", "shared"])
def test_a_run_continues_with_what_it_began_with(fusion, caplog):
    with caplog.at_level(logging.WARNING):
        found = with_recorded_draws(recipe(fusion), EARLIER, MAIN)
    assert (found.first_date, found.has_structural_masks) == ("ends", True)
    (message,) = caplog.messages
    assert "data.first_date=ends" in message
    assert ("masking.structure=true" in message) == (fusion in ("monotemp", "shared"))
    # Its next checkpoint records both, and the one after continues with them too.
    assert with_recorded_draws(recipe(fusion), NOW, MAIN) == found


def test_a_run_of_this_revision_continues_without_a_message(caplog):
    data, masking = {"order": {"first_date": "any"}}, {"masking": {"structure": False}}
    found = with_recorded_draws(recipe("monotemp"), {"data": data, "train": masking}, MAIN)
    assert (found.first_date, found.has_structural_masks, caplog.messages) == ("any", False, [])


def test_a_finetuning_continues_with_its_dates():
    assert with_recorded_draws(recipe("monotemp"), TUNED, MAIN).first_date == "ends"
    assert with_recorded_draws(recipe(), {**TUNED, "first_date": "any"}, MAIN).first_date == "any"
    # A finetuning has no masks.
    assert not with_recorded_draws(recipe("monotemp"), TUNED, MAIN).has_structural_masks


def test_what_the_recipe_states_is_kept():
    stated = recipe("monotemp", "any", False)
    assert with_recorded_draws(stated, EARLIER, MAIN) == stated
    assert recipe("group", structure=False).has_structural_masks is False
    assert recipe("shared", structure=True).has_structural_masks is True


def test_a_recorded_value_that_no_revision_wrote_is_ignored():
    odd = {"data": {"order": {"first_date": "x"}}, "train": {"masking": {"structure": 3}}}
    assert with_recorded_draws(recipe(), odd, MAIN).data.first_date == "auto"
