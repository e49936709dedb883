"""Under autocast, one operation casts all parameters of a module; values and gradients are those of autocast."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from testkit.models import full_batch, small_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_scale.model import cast
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import MaskingConfig, draw_masks
from maestro_scale.model.transformer import Block
from maestro_scale.training.objectives import hidden_counts


class Operations(TorchDispatchMode):
    """Counts dispatched operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def loss_and_gradients(config) -> tuple[float, dict[str, torch.Tensor]]:
    batch, model = full_batch(config, 3), Maestro(config).initialise(0)
    masks = draw_masks(config, MaskingConfig(), batch)
    with bf16():
        loss, sums = model(batch, masks, hidden_counts(config, [masks]))
    loss.backward()
    assert loss.dtype == sums.dtype == torch.float32
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("changes", [{}, {"fusion": "mod", "spectral": "token", "norm": "token"}])
def test_gradients_are_bitwise_those_of_autocast(checkpointing, changes):
    config = small_config(checkpointing=checkpointing, **changes)
    loss, gradients = loss_and_gradients(config)
    with mock.patch.object(cast, "cast_together", list):
        expected_loss, expected = loss_and_gradients(config)
    assert loss == expected_loss
    assert all(torch.equal(gradients[n], g) for n, g in expected.items())
    assert all(g.dtype == torch.float32 for g in gradients.values())


def test_a_block_casts_its_seven_parameters_and_its_input_by_one_operation_each_way():
    block, x = Block(16, 2, 8, 32), torch.randn(2, 5, 16, requires_grad=True)
    for p in block.parameters():
        nn.init.normal_(p)
    with Operations() as forward, bf16():
        y = block(x)
    with Operations() as backward:
        y.backward(torch.ones_like(y))
    assert y.dtype == torch.float32  # the residual stream
    assert forward.counts["_foreach_copy_"] == backward.counts["_foreach_copy_"] == 1
    # The other casts: the output of the MLP's norm, and its gradient; the gradients of the two branches.
    assert forward.counts["_to_copy"] == 1
    assert backward.counts["_to_copy"] == 3


def test_nothing_is_cast_without_autocast_or_in_the_compute_dtype():
    tensors = [torch.ones(2), torch.ones(3, dtype=torch.bfloat16)]
    assert all(a is b for a, b in zip(cast.cast_together(tensors), tensors, strict=True))
    with bf16():
        one, two = cast.cast_together(tensors)
        assert one.dtype == torch.bfloat16
        assert two is tensors[1]


def test_gradients_of_unused_tensors_are_none():
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    with bf16():
        used, _ = cast.cast_together([a, b])
    (2 * used).sum().backward()
    assert torch.equal(a.grad, torch.full((2,), 2.0))
    assert b.grad is None
