"""Galileo: equal to the original code on given inputs and weights, and the adaptation of datasets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maestro_scale.datasets.flair_hub.reader import FULL_SPEC as FLAIR
from maestro_scale.datasets.treesatai_ts.reader import SPEC as TREESAT
from maestro_scale.evaluation.baselines.galileo import GROUPS, Galileo, GalileoNetwork
from maestro_scale.evaluation.baselines.inputs import sensor_inputs
from maestro_scale.evaluation.baselines.registry import build_baseline
from maestro_scale.evaluation.results import EvaluationError
from tests.evaluation.test_presto import filled, images

CHANNELS = ([0, 1], [2, 3, 4], [5, 6, 7], [8], [9], [10, 11], [12])


def published(depth=1):
    """A state dict with the names and shapes of the published file, filled by a formula."""
    state = GalileoNetwork(128, depth, 8, 2).state_dict()
    for name in [n for n in state if ".qkv." in n]:
        tensor = state.pop(name)
        for letter in "qkv":
            state[name.replace("qkv", letter)] = tensor[:128]
    return filled(state)


def spec_with_patches_of_two():
    return TREESAT.select(["s2", "s1_asc"])


def test_it_computes_what_the_original_code_does(tmp_path):
    torch.save(
        {f"blocks.backbone{n[6:]}" if n.startswith("blocks") else n: t for n, t in published().items()},
        tmp_path / "encoder.pt",
    )
    encoder = Galileo(sensor_inputs(spec_with_patches_of_two()), {"weights": str(tmp_path / "encoder.pt")})
    size, side, steps = 2, 4, 3
    x = torch.sin(torch.arange(size * side * side * steps * 13).float()).view(size, side, side, steps, 13)
    terrain = torch.cos(torch.arange(size * side * side * 16).float()).view(size, side, side, 16)[..., :2]
    groups = {g.name: x[..., c].permute(0, 3, 4, 1, 2) for g, c in zip(GROUPS, CHANNELS, strict=True)}
    radar = torch.tensor([[True, False, True], [True, True, True]])
    index = torch.tensor([[True] * 3, [False] * 3])
    with torch.no_grad():
        found = encoder.network(
            groups,
            torch.tensor([[0, 5, 11], [3, 4, 4]]),
            10.0,
            {"S1": radar, "NDVI": index, "location": torch.tensor([True, False])},
            terrain.permute(0, 3, 1, 2),
            torch.tensor([[0.6, 0.2, 0.7], [0.0, 0.0, 1.0]]),
        )
    # By nasaharvest/galileo at 0f0b5b9 (single_file_galileo.py), with the same weights and inputs.
    expected = [
        [-0.5726376175880432, -1.14811372756958, -0.7082700133323669, -0.7611629962921143],
        [-0.6599944233894348, -1.1834036111831665, -0.7881590723991394, -0.8104943633079529],
    ]
    np.testing.assert_allclose(found[:, 0, :4], expected, atol=1e-5)
    expected = [[-0.7114703059196472, -1.3299578428268433], [-0.7593561410903931, -1.3713146448135376]]
    np.testing.assert_allclose(found[:, 3, :2], expected, atol=1e-5)
    assert found.abs().sum().item() == pytest.approx(728.9324340820312, rel=1e-5)


def test_patches_of_the_sensors_are_read_and_described():
    baseline = build_baseline("galileo:untrained", None, TREESAT)
    assert sum(p.numel() for p in baseline.parameters()) == 1_037_088
    assert "images of 6x6 pixels of 10 m (others averaged or repeated), patches of 2x2" in baseline.adaptation
    assert "leaves out aerial; dates: means per calendar month" in baseline.adaptation
    (sensor,) = baseline.token_view().sensors
    assert (sensor.name, sensor.num_dates, sensor.grid, baseline.width) == ("joint", 1, 3, 128)
    given = images(TREESAT)
    encoder = baseline.encoder
    with torch.no_grad():
        tokens = encoder.tokens(given)["joint"]
        given.pixels["s2"][:, :, :, :2, 2:4] += 0.3  # the second patch of the first row
        moved = (encoder.tokens(given)["joint"] - tokens).abs().mean(dim=(0, 1, 3))
    assert moved.argmax() == 1
    assert "SRTM from dem" in Galileo(sensor_inputs(FLAIR), {"weights": "untrained", "patch": "5"}).adaptation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": "4"}, "a patch of 4 pixels: sensor s2 has 6x6 pixels; use a divisor, at most 8: patch=N"),
        ({"patch": "no"}, "a patch of no pixels"),
        ({"pach": "2"}, "there is no option 'pach' .did you mean 'patch'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(EvaluationError, match=message):
        Galileo(sensor_inputs(TREESAT), {"weights": "untrained", **options})


def test_other_weights_are_refused(tmp_path):
    torch.save({"norm.weight": torch.zeros(128)}, tmp_path / "a.pt")
    torch.save({"norm.weight": torch.zeros(100)}, tmp_path / "b.pt")
    torch.save([1], tmp_path / "c.pt")
    for name, message in (
        ("a.pt", "is not the weights of Galileo's encoder: it lacks"),
        ("b.pt", "is not the weights of Galileo's encoder .nano, tiny or base."),
        ("c.pt", "is not a state dict"),
    ):
        with pytest.raises(EvaluationError, match=message):
            Galileo(sensor_inputs(TREESAT), {"weights": str(tmp_path / name)})


def test_every_used_weight_is_trained():
    tuned = build_baseline("galileo:untrained", None, TREESAT).prepared_for_training()
    frozen = {n.removeprefix("encoder.network.").split(".")[0] for n, _ in tuned.named_buffers()}
    assert frozen == {
        *("space_embed", "time_embed", "static_embed", "sp_channel_embed", "t_channel_embed"),
        *("month_embed", "pos_embed", "resize"),
    }
    names = [n for n, _ in tuned.named_parameters() if "static_embed" in n]
    assert names == [
        "encoder.network.static_embed.location.weight",
        "encoder.network.static_embed.location.bias",
    ]
