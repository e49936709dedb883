"""Baselines: channel statistics against numpy, and image encoders of transformers with random weights."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from maestro_scale.evaluation.baselines.image import ImageEncoder
from maestro_scale.evaluation.baselines.registry import build_baseline
from maestro_scale.evaluation.baselines.statistics import ChannelStatistics
from maestro_scale.evaluation.benchmark import Benchmark
from maestro_scale.evaluation.frozen.evaluate import evaluate_frozen
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.recipe import load_recipe
from maestro_scale.stream.batch import Batch
from tests.evaluation.conftest import FIELDS
from tests.evaluation.test_evaluate import evaluator

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def dinov2():
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**SMALL, patch_size=14, image_size=56)).eval()


def dinov3():
    torch.manual_seed(0)
    return DINOv3ViTModel(DINOv3ViTConfig(**SMALL, patch_size=16, num_register_tokens=4)).eval()


def batch(size=2):
    rng = np.random.default_rng(0)
    pixels = {
        "aerial": torch.from_numpy(rng.integers(0, 255, (size, 1, 3, 16, 16), dtype=np.uint8)),
        "s2": torch.from_numpy(rng.integers(0, 3000, (size, 2, 2, 4, 4)).astype(np.int16)),
    }
    return Batch("fields", pixels, {}, torch.zeros(size, 3), {}, {}, ("a", "b"), 0)


def test_statistics_are_the_means_and_deviations_of_patches():
    tokens = ChannelStatistics(FIELDS).encode(batch())
    assert {k: tuple(v.shape) for k, v in tokens.items()} == {"aerial": (2, 1, 4, 6), "s2": (2, 2, 16, 4)}
    corner = batch().pixels["aerial"][1, 0, :, :8, 8:].double().numpy() / 255
    expected = np.concatenate([corner.mean((1, 2)), corner.std((1, 2))])
    np.testing.assert_allclose(tokens["aerial"][1, 0, 1], expected, rtol=1e-5)


def pixio():
    module = pytest.importorskip("transformers.models.pixio", reason="needs transformers")
    torch.manual_seed(0)
    return module.PixioModel(module.PixioConfig(**SMALL, patch_size=16, image_size=32)).eval()


@pytest.mark.parametrize("backbone", [dinov2, dinov3, pixio])
def test_tokens_lie_on_the_sensors_grid(backbone):
    encoder = ImageEncoder(FIELDS, backbone(), "tiny")
    with torch.no_grad():
        embedding = encoder.embed(batch())
        assert {k: tuple(v.shape) for k, v in embedding.tokens.items()} == {
            "aerial": (2, 1, 4, 32),
            "s2": (2, 2, 16, 32),
        }
        assert embedding.vector.shape == (2, 64)
        # Dates are images of their own: another second date leaves the first one's tokens alone.
        other = batch()
        other.pixels["s2"][:, 1] += 500
        np.testing.assert_array_equal(encoder.encode(other)["s2"][:, 0], embedding.tokens["s2"][:, 0])


def test_images_reach_the_backbone_normalised_as_it_expects():
    seen = []

    class Spy(torch.nn.Module):
        config, dtype = type("Config", (), {"patch_size": 8, "hidden_size": 7}), torch.float32

        def forward(self, pixel_values):
            seen.append(pixel_values)
            return type("Out", (), {"last_hidden_state": torch.zeros(len(pixel_values), 5, 7)})

    aerial = dataclasses.replace(FIELDS, sensors=FIELDS.sensors[:1])
    ImageEncoder(aerial, Spy(), "spy").encode(batch())
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    plain = batch().pixels["aerial"][:, 0].numpy() / 255
    np.testing.assert_allclose(
        seen[0], (plain - mean[:, None, None]) / deviation[:, None, None], atol=1e-4, rtol=1e-4
    )


def test_more_bands_keep_the_kernels_of_colours():
    from maestro_scale.evaluation.baselines.image import _mixing

    torch.testing.assert_close(
        _mixing(("NIR", "R", "G", "B")),
        0.75 * torch.tensor([[1 / 3, 1, 0, 0], [1 / 3, 0, 1, 0], [1 / 3, 0, 0, 1]]),
    )
    torch.testing.assert_close(_mixing(("R", "G", "B")), torch.eye(3))


def test_baselines_are_scored_as_encoders_are(fields, tmp_path):
    benchmark = Benchmark(FIELDS, str(fields.shards), tmp_path / "cache", tmp_path / "features")
    (statistics,) = evaluate_frozen(ChannelStatistics(FIELDS), benchmark, ["probe"])
    assert statistics.value > 0.9  # colours are all there is to these fields
    (image,) = evaluate_frozen(ImageEncoder(FIELDS, dinov2(), "tiny"), benchmark, ["probe"])
    assert 0 < image.value < 1
    assert image.confusion != statistics.confusion, "features of one were taken for the other's"


def test_unknown_baselines_are_named(fields, tmp_path):
    recipe = load_recipe(fields.recipe(tmp_path))
    with pytest.raises(EvaluationError, match="there are: statistics, untrained, random, image:WEIGHTS"):
        build_baseline("resnet", recipe, FIELDS)
    with pytest.raises(EvaluationError, match="no image encoder can be loaded from there"):
        build_baseline(f"image:{tmp_path}", recipe, FIELDS)


@pytest.mark.slow
def test_the_command(fields, tmp_path):
    dinov2().save_pretrained(tmp_path / "dinov2")
    small = ["model.size=tiny", "model.width=32", "model.depth=2", "model.heads=2", "model.inter_depth=1"]
    for name in ("random", f"image:{tmp_path / 'dinov2'}"):
        code, output = evaluator(fields, tmp_path).run(
            None, 1, f"--baseline={name}", "--mode=knn", f"--out={tmp_path / name[:5]}", "--set", *small
        )
        assert code == 0, output[-3000:]
        result = EvalResult.load(tmp_path / name[:5] / "knn" / "results.json")
        assert (result.encoder, result.trained_on, result.checkpoint_step) == (name, (), 0)
