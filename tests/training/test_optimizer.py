"""Learning-rate schedules and parameter groups, in numbers computed by hand."""

from __future__ import annotations

import pytest
import torch

from maestro_scale.training.optimizer import (
    build_optimizer,
    cosine,
    depths_below_top,
    one_cycle,
    set_lr,
)


def test_one_cycle_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    ours = torch.optim.AdamW([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(ours, one_cycle(100, 0.2, 1e-3, 1e-7))
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        theirs, 2.0, 100, pct_start=0.2, div_factor=1e3, final_div_factor=1e4, cycle_momentum=False
    )
    for _ in range(99):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        for optimizer, schedule in ((ours, scheduler), (theirs, reference)):
            optimizer.step()
            schedule.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(2e-7, rel=1e-3)


def test_cosine_rises_then_falls():
    factor = cosine(100, 0.1, 1e-3, 1e-7)
    values = [factor(s) for s in range(100)]
    assert values[0] == pytest.approx(1e-3)
    assert max(values) == pytest.approx(1.0)
    assert values.index(max(values)) == 10
    assert values[-1] == pytest.approx(1e-7, abs=1e-6)


@pytest.mark.parametrize("schedule", [one_cycle, cosine])
def test_schedules_survive_runs_of_few_steps(schedule):
    for steps in (1, 2, 3, 5):
        factor = schedule(steps, 0.2, 1e-3, 1e-7)
        assert all(0 < factor(s) <= 1 for s in range(steps + 1))


def test_one_cycle_by_hand():
    # 11 steps, a warm-up of 5 of them: the peak is at step 4, the end at step 10.
    factor = one_cycle(11, 5 / 11, 0.01, 0.001)
    assert factor(0) == pytest.approx(0.01)
    assert factor(1) == pytest.approx(0.154982, abs=1e-6)  # 1 + (0.01 - 1) * (1 + cos(pi / 4)) / 2
    assert factor(2) == pytest.approx((0.01 + 1) / 2)
    assert factor(4) == pytest.approx(1.0)
    assert factor(7) == pytest.approx((1 + 0.001) / 2)
    assert factor(10) == pytest.approx(0.001)
    assert factor(11) == factor(50) == pytest.approx(0.001)
    # Without a warm-up the first step is the peak.
    assert [one_cycle(5, 0.0, 0.01, 0.001)(s) for s in (0, 2, 4)] == pytest.approx([1.0, 0.5005, 0.001])


def test_cosine_by_hand():
    # 21 steps, a warm-up of 4 of them: linear to step 4, then cosine to step 20.
    factor = cosine(21, 4 / 21, 0.2, 0.1)
    assert [factor(s) for s in (0, 1, 2, 3, 4)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(8) == pytest.approx(0.868198, abs=1e-6)  # 0.1 + 0.9 * (1 + cos(pi / 4)) / 2
    assert factor(12) == pytest.approx(0.55)
    assert [factor(s) for s in (20, 21, 99)] == pytest.approx([0.1, 0.1, 0.1])


def test_learning_rates_of_groups_by_hand():
    model = torch.nn.ModuleDict(
        {
            "patch_embed": torch.nn.Linear(2, 2),
            "encoders": torch.nn.ModuleDict(
                {"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])}
            ),
            "heads": torch.nn.Linear(2, 2),
        }
    )
    optimizer = build_optimizer(model, 8.0, (0.9, 0.99), 1e-8, 0.1, layer_decay=0.5)
    # The head learns at 8, the upper block at 4, the lower one at 2, the patch embedding at 1; each with a group of
    # weights, which decay, and one of biases, which do not.
    assert [(g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (8.0, 0.1), (8.0, 0.0), (4.0, 0.1), (4.0, 0.0), (2.0, 0.1), (2.0, 0.0), (1.0, 0.1), (1.0, 0.0)
    ]  # fmt: skip
    assert set_lr(optimizer, 0.25) == 2.0
    assert [g["lr"] for g in optimizer.param_groups] == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups[2:6]] == [
        ["encoders.blocks.1.weight"],
        ["encoders.blocks.1.bias"],
        ["encoders.blocks.0.weight"],
        ["encoders.blocks.0.bias"],
    ]


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(model, 1.0, (0.9, 0.99), 1e-8, 0.1)
    decayed, plain = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0.0


def test_everything_decays_where_the_recipe_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    (group,) = build_optimizer(model, 1.0, (0.9, 0.99), 1e-8, 0.1, decay="all").param_groups
    assert len(group["params"]) == 4
    assert group["weight_decay"] == 0.1


def test_matrices_that_are_not_weights_of_linear_maps_do_not_decay():
    model = torch.nn.ParameterDict({"queries": torch.zeros(3, 4), "linear_weight": torch.zeros(2, 2)})
    decayed, plain = build_optimizer(model, 1.0, (0.9, 0.99), 1e-8, 0.1).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 2)]
    assert [tuple(p.shape) for p in plain["params"]] == [(3, 4)]


def test_schedules_whose_warmup_is_the_whole_run():
    # The peak is the last of 3 steps; what is asked beyond it is the final value.
    assert [one_cycle(3, 1.0, 0.1, 0.01)(s) for s in (0, 1, 2, 3)] == pytest.approx([0.1, 0.55, 1.0, 0.01])
    assert [cosine(3, 2 / 3, 0.2, 0.1)(s) for s in (0, 1, 2, 3)] == pytest.approx([0.2, 0.6, 1.0, 0.1])
    # Without a warm-up the first step alone has the start value; 0.1 + 0.9 * (1 + cos(pi / 4)) / 2 = 0.868198.
    factor = cosine(5, 0.0, 0.2, 0.1)
    assert [factor(s) for s in (0, 1, 2, 4)] == pytest.approx([0.2, 0.868198, 0.55, 0.1], abs=1e-6)


def _blocks(number: int) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(number))})


def test_depths_are_counted_from_the_top():
    encoder = _blocks(3)
    encoder["norm"] = torch.nn.LayerNorm(1)
    model = torch.nn.ModuleDict(
        {
            "patch_embed": torch.nn.Linear(1, 1),
            "encoders": torch.nn.ModuleDict({"s2": encoder, "s1": _blocks(2)}),
            "inter": _blocks(2),
            "decoders": _blocks(4),
        }
    )
    depths = {name: depth for name, depth in depths_below_top(model).items() if name.endswith("weight")}
    assert depths == {
        **{f"decoders.blocks.{i}.weight": 0 for i in range(4)},
        "inter.blocks.1.weight": 1,
        "inter.blocks.0.weight": 2,
        "encoders.s2.norm.weight": 3,
        "encoders.s2.blocks.2.weight": 3,
        "encoders.s2.blocks.1.weight": 4,
        "encoders.s1.blocks.1.weight": 4,
        "encoders.s2.blocks.0.weight": 5,
        "encoders.s1.blocks.0.weight": 5,
        "patch_embed.weight": 6,
    }


def test_depths_of_an_image_encoder():
    layers = torch.nn.ModuleDict({"layer": torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))})
    backbone = {"embeddings": torch.nn.Linear(1, 1), "encoder": layers, "layernorm": torch.nn.LayerNorm(1)}
    encoder = torch.nn.ModuleDict({"backbone": torch.nn.ModuleDict(backbone)})
    model = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(1, 1)})
    depths = {name: depth for name, depth in depths_below_top(model).items() if name.endswith("weight")}
    assert depths == {
        "head.weight": 0,
        "encoder.backbone.layernorm.weight": 1,
        "encoder.backbone.encoder.layer.1.weight": 1,
        "encoder.backbone.encoder.layer.0.weight": 2,
        "encoder.backbone.embeddings.weight": 3,
    }


def test_without_layer_decay_all_layers_learn_alike_in_one_fused_step():
    model = torch.nn.ModuleDict({"encoders": _blocks(2), "head": torch.nn.Linear(1, 1)})
    optimizer = build_optimizer(model, 8.0, (0.8, 0.95), 1e-7, 0.1)
    assert [(g["peak_lr"], len(g["params"])) for g in optimizer.param_groups] == [(8.0, 3), (8.0, 3)]
    assert optimizer.defaults["fused"]
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-7)
