"""Finetuning of image encoders: the same schedule, engine, checkpoints and head as for MAESTRO."""

from __future__ import annotations

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel, ViTConfig, ViTModel

from maestro_scale.evaluation.baselines.image import ImageEncoder
from maestro_scale.evaluation.finetune.predictor import build_predictor
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.training.optimizer import build_optimizer, set_lr
from tests.evaluation.conftest import FIELDS
from tests.evaluation.test_baselines import SMALL, batch
from tests.evaluation.test_finetune import evaluated, losses, numbers

CLASSES = {
    "dinov2": (Dinov2Model, Dinov2Config(**SMALL, patch_size=14, image_size=56)),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**SMALL, patch_size=16, num_register_tokens=4)),
    "vit": (ViTModel, ViTConfig(**SMALL, patch_size=8, image_size=32)),
}


def encoder(name: str) -> ImageEncoder:
    made, config = CLASSES[name]
    torch.manual_seed(77)
    return ImageEncoder(FIELDS, made(config), name)


@pytest.fixture(scope="module")
def objective():
    return target_loss_for(task_for(FIELDS))


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_every_weight_learns_and_lower_layers_slower(objective, name):
    network = build_predictor(encoder(name), "fields", objective, seed=1, pretrained=True)
    network.logits(batch()).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    optimizer = build_optimizer(network, 1.0, (0.9, 0.99), 1e-8, 0.1, layer_decay=0.5)
    set_lr(optimizer, 1.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    found: dict[str, set[float]] = {}
    for parameter, p in network.named_parameters():
        part = next(k for k in ("head", "layer.1", "layer.0", "embeddings", "norm") if k in parameter)
        found.setdefault(part, set()).add(rates[id(p)])
    assert found == {"head": {1.0}, "layer.1": {0.5}, "layer.0": {0.25}, "embeddings": {0.125}, "norm": {0.5}}


def test_scratch_shares_only_the_shape(objective):
    base = encoder("dinov2")
    tuned, scratch, again = (
        build_predictor(base, "fields", objective, 5, pretrained).state_dict()
        for pretrained in (True, False, False)
    )
    assert tuned.keys() == scratch.keys()
    assert all(torch.equal(v, again[k]) for k, v in scratch.items())
    for name, tensor in base.state_dict().items():
        assert torch.equal(tuned[f"encoder.{name}"], tensor)
    kernel = "encoder.backbone.encoder.layer.0.mlp.fc1.weight"
    assert not torch.equal(scratch[kernel], tuned[kernel])
    assert torch.equal(scratch["head.linear.weight"], tuned["head.linear.weight"])
    # What the network learns, the encoder it was made of does not.
    build_predictor(base, "fields", objective, 5, True).encoder.backbone.layernorm.weight.data.zero_()
    assert base.backbone.layernorm.weight.abs().sum() > 0


@pytest.mark.slow
def test_the_command_resumes_and_two_ranks_learn_the_same(fields, tmp_path):
    encoder("vit").backbone.save_pretrained(tmp_path / "vit")
    args = [f"--baseline=image:{tmp_path / 'vit'}", "--mode=finetune"]
    folder = tmp_path / "one" / "finetune"
    folder.mkdir(parents=True)
    (folder / "STOP").touch()
    course = ["train.steps=6"]
    assert "stopped" in evaluated(fields, tmp_path, tmp_path / "one", *args, course=course)
    output = evaluated(fields, tmp_path, tmp_path / "one", *args, "--mode=scratch", course=course)
    assert "finetune: mIoU" in output
    assert len(losses(folder)) == 6
    assert losses(folder)[-1] < losses(folder)[0]
    assert numbers(folder)["encoder"] == f"image:{tmp_path / 'vit'}"
    assert losses(tmp_path / "one" / "scratch")[0] != losses(folder)[0]
    zero3 = [*course, "deepspeed.zero_optimization.stage=3"]
    evaluated(fields, tmp_path, tmp_path / "two", *args, ranks=2, course=zero3)
    assert losses(tmp_path / "two" / "finetune") == pytest.approx(losses(folder), rel=1e-4)
