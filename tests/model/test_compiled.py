"""Compiled training: one compilation per dataset or shape, results of eager mode, no host data in the graph.

With the backend ``aot_eager``, which traces forward and backward pass like the default one and generates no code;
tests/training/test_compiled_runs.py runs the default backend.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from testkit.models import full_batch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from maestro_scale.model.compiled import copy_first_gradients
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import Mask, MaskingConfig, draw_masks
from maestro_scale.stream.batch import Batch
from maestro_scale.training.hooks.pictures import reconstruction_views
from maestro_scale.training.objectives import hidden_counts
from tests.training.test_mixtures import two_views


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs_of(config: ModelConfig, dataset: str, seed: int = 0) -> tuple[Batch, dict[str, Mask], Tensor]:
    """A micro-batch of two samples, its masks and counts."""
    view = config.for_dataset(dataset)
    batch = dataclasses.replace(full_batch(view, 2, seed), dataset=dataset)
    masks = draw_masks(view, MaskingConfig(), batch)
    return batch, masks, hidden_counts(view, [masks])


def evaluate(model: Maestro, config: ModelConfig, dataset: str) -> None:
    """Everything that a run does with the trained model beside its steps, and users with a model."""
    batch, masks, counts = inputs_of(config, dataset)
    bands = {s.name: tuple(map(str, s.bands)) for s in config.for_dataset(dataset).sensors}
    reconstruction_views(model, batch, masks, bands)
    with torch.no_grad():
        model.encode(batch.first())
        model.embed(batch)
        model.reconstruct(
            batch.first(), draw_masks(config.for_dataset(dataset), MaskingConfig(), batch.first())
        )
        model(batch, masks, counts)


@pytest.mark.slow
@torch._dynamo.config.patch(error_on_recompile=True)
def test_the_step_is_compiled_once_per_dataset_and_by_nothing_else():
    config = dataclasses.replace(two_views(), checkpointing="every_2")
    backend = CompileCounterWithBackend("aot_eager")
    model = Maestro(config).initialise(0).compile_training("step", backend=backend)
    for seed, dataset in enumerate(["one", "two", "two", "one", "one", "two"]):
        model(*inputs_of(config, dataset, seed))[0].backward()
        evaluate(model, config, dataset)
        assert backend.frame_count == min(seed + 1, 2)


# compile_training must raise the limit: beyond it, a step is an error. The name is that of torch 2.6.
@pytest.mark.slow
@torch._dynamo.config.patch(cache_size_limit=2)
def test_blocks_are_compiled_once_per_shape_and_by_nothing_else():
    config = two_views()
    backend = CompileCounterWithBackend("aot_eager")
    model = Maestro(config).initialise(0).compile_training("blocks", backend=backend)
    # Tokens of "one": 16 of aerial, 36 of s2 and of s1, of which 4, 9 and 9 are visible. Shapes: encoders 4 and 9 (s2
    # and s1 share it), blocks over all groups 22, last decoder blocks 16 and 36. "two" has 64 of aerial (16 visible)
    # and 36 of s2 (9): 16, 25 and 64 are new. The depth of the encoder, 3, does not matter.
    expected = {"one": 5, "two": 8}
    for seed, dataset in enumerate(["one", "two", "two", "one", "one", "two"]):
        model(*inputs_of(config, dataset, seed))[0].backward()
        evaluate(model, config, dataset)
        assert backend.frame_count == (expected[dataset] if seed < 2 else 8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "step"])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_sums_and_gradients_are_those_of_eager_mode(mode, autocast):
    def of(mode: str) -> list[Tensor]:
        model = Maestro(two_views()).initialise(0).compile_training(mode, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, sums = model(*inputs_of(model.config, "two"))
        loss.backward()
        assert not sums.requires_grad
        return [loss.detach(), sums, *(p.grad for p in model.parameters() if p.grad is not None)]

    eager, compiled = of("none"), of(mode)
    assert len(compiled) == len(eager)
    for a, b in zip(eager, compiled, strict=True):
        # In bf16 the compiled graph casts a weight at each use, and adds the gradients of its uses in fp32.
        torch.testing.assert_close(b, a, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-7)


def test_the_graph_holds_no_data_of_the_host_and_does_not_wait_for_the_device():
    aten = torch.ops.aten
    waits = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
    from_host = {aten.lift_fresh_copy.default, aten.lift_fresh.default, torch.ops.prims.device_put.default}
    graphs: list[torch.fx.Graph] = []

    def record(module: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    model = Maestro(two_views()).initialise(0)
    model.compile_training("step", backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    model(*inputs_of(model.config, "two"))[0].backward()
    assert len(graphs) == 2  # forward, backward
    for node in (n for graph in graphs for n in graph.nodes):
        if node.op == "placeholder":
            assert isinstance(node.meta["val"], Tensor), node
            assert not any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape), node
        assert node.op != "get_attr", f"a constant of the host: {node.format_node()}"
        assert node.target not in waits | from_host, node.format_node()
        assert "device" not in node.kwargs or node.target is not aten._to_copy.default, node.format_node()


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_computes_with_its_own_weights():
    model = Maestro(two_views()).initialise(0).compile_training("step", backend="aot_eager")
    inputs = inputs_of(model.config, "two")
    loss = model(*inputs)[0]
    twin = copy.deepcopy(model).initialise(1)
    expected = Maestro(two_views()).initialise(1)(*inputs)[0]
    assert twin(*inputs)[0].item() == pytest.approx(expected.item(), rel=1e-6) != loss.item()


class _OverwrittenGradient(torch.autograd.Function):
    """Gradients as those of a CUDA graph: each run writes into the same tensor, which autograd believes to own."""

    buffer = torch.zeros(3)

    @staticmethod
    def forward(ctx, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _OverwrittenGradient.buffer.fill_(ctx.value), None


@pytest.mark.parametrize("copies", [False, True])
def test_gradients_of_a_cuda_graph_are_accumulated_only_if_the_first_is_copied(copies):
    model = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    if copies:
        copy_first_gradients(model)
    # As torch's CUDA graphs do with their outputs.
    torch._C._set_cached_tensors_enabled(True)
    torch._C._add_cached_tensor(_OverwrittenGradient.buffer)
    try:
        for _ in range(2):  # steps
            model[0].grad = None
            for value in (1.0, 2.0):
                _OverwrittenGradient.apply(model[0], value).backward()
            # Without copies the second gradient is added to itself.
            assert model[0].grad.tolist() == [3.0 if copies else 4.0] * 3
    finally:
        torch._C._remove_cached_tensor(_OverwrittenGradient.buffer)
        torch._C._set_cached_tensors_enabled(False)
