"""``torch.compile`` of the training step: forward and loss of a micro-batch as one graph per dataset.

The backward pass is compiled with it (AOTAutograd). On a GPU both are recorded as CUDA graphs (``reduce-overhead``),
whose outputs are overwritten by the next run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.layout import Layout
from maestro_scale.model.masking import Mask
from maestro_scale.stream.batch import Batch

Losses = tuple[Tensor, Tensor]
Backend = str | Callable[..., Any]
CompiledBlock = Callable[[nn.Module, Tensor, int], Tensor]
# Most compiled versions of a block. More are an error (fullgraph), not a silent change to eager mode.
MAX_BLOCK_SHAPES = 128


class Network(Protocol):
    """What is compiled of :class:`maestro_scale.model.maestro.Maestro`, which imports this module."""

    def view(self, dataset: str) -> ModelConfig: ...

    def layout(self, view: ModelConfig, masks: dict[str, Mask] | None, like: Tensor) -> Layout: ...

    def loss_of_tensors(
        self,
        layout: Layout,
        pixels: dict[str, Tensor],
        dates: dict[str, Tensor],
        ref_date: Tensor,
        masks: dict[str, Mask],
        counts: Tensor,
    ) -> Losses: ...


class CompiledStep:
    """``Maestro.loss_of_tensors``, compiled at the first call for each dataset: static shapes, no graph break.

    ``cuda_graphs``: record it as CUDA graphs (GPU only).
    """

    def __init__(self, cuda_graphs: bool, backend: Backend = "inductor") -> None:
        _trace_backward_without_autocast()
        self._cuda_graphs, self._backend = cuda_graphs, backend
        # With the layouts: built in the graph, their tensors would be in memory that the next run overwrites.
        self._by_dataset: dict[str, tuple[Layout, Callable[..., Losses]]] = {}

    def __call__(self, model: Network, batch: Batch, masks: dict[str, Mask], counts: Tensor) -> Losses:
        """As ``Maestro.forward``; all batches of a dataset have the same shapes."""
        if batch.dataset not in self._by_dataset:
            layout = model.layout(model.view(batch.dataset), masks, batch.ref_date)
            self._by_dataset[batch.dataset] = layout, self._compile(batch.dataset)
        layout, compiled = self._by_dataset[batch.dataset]
        if self._cuda_graphs:
            # The outputs of the previous micro-batch may be overwritten from here on: its backward pass has run.
            torch.compiler.cudagraph_mark_step_begin()
        share, sums = compiled(model, layout, batch.pixels, batch.dates, batch.ref_date, masks, counts)
        # The sums are collected over micro-batches; the share is not used after its backward pass.
        return share, (sums.clone() if self._cuda_graphs else sums)

    def _compile(self, dataset: str) -> Callable[..., Losses]:
        return torch.compile(
            _loss_function(dataset),
            fullgraph=True,
            dynamic=False,
            backend=self._backend,
            mode="reduce-overhead" if self._cuda_graphs else None,
        )


def compiled_block(backend: Backend = "inductor") -> CompiledBlock:
    """The call of a block, compiled at the first call with each shape.

    Blocks of equal shapes share their compiled code, so the number of compilations does not depend on the depth.
    """
    import torch._dynamo.config as dynamo  # takes a second, and only compilation needs it

    _trace_backward_without_autocast()
    # torch's limit of 8 versions is below the number of shapes: one per sequence in encoder and decoder, and another in
    # the last decoder block, for each dataset.
    # The name is that of torch 2.6; later versions keep it as another name of recompile_limit.
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, MAX_BLOCK_SHAPES)
    return torch.compile(_run_block, fullgraph=True, dynamic=False, backend=backend)


def copy_first_gradients(model: nn.Module) -> None:
    """Let every parameter copy the first gradient that it accumulates, instead of keeping the tensor itself.

    For gradients accumulated in ``param.grad`` (ZeRO 0 and 1) over several runs of a CUDA graph: its outputs are
    overwritten by the next run.
    """
    for parameter in model.parameters():
        parameter.register_hook(partial(_copied_if_first, parameter))


def _copied_if_first(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    return gradient.clone() if parameter.grad is None else gradient


def _trace_backward_without_autocast() -> None:
    import torch._functorch.config as functorch

    # DeepSpeed's autocast covers the forward pass only. By default the compiled backward pass is traced under it too,
    # and differs from eager mode. Releases without this setting have the default only.
    if hasattr(functorch, "backward_pass_autocast"):
        functorch.backward_pass_autocast = "off"


def _run_block(block: nn.Module, x: Tensor, skip: int) -> Tensor:
    return block(x, skip)


def _loss_function(dataset: str) -> Callable[..., Losses]:
    """``Maestro.loss_of_tensors`` with its own code object.

    torch stores compiled versions by code object. So the step of a second dataset is not a recompilation of the first
    one's, whose guards would otherwise be evaluated in each of its steps.
    """

    def step(model: Network, *inputs: Any) -> Losses:
        return model.loss_of_tensors(*inputs)

    code = step.__code__.replace(co_name=f"step of {dataset}")
    return FunctionType(code, step.__globals__, code.co_name)
