"""The moving average of a network's weights, in a second network that can be asked at any time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from maestro_scale.interop.tensors import write_tensors


class Average:
    """``average = decay · average + (1 - decay) · weights`` after every step; the decay grows from 0.1 to ``decay``, as
    a long memory would hold little but the start at first. With ``decay`` 0 it is the weights themselves.

    ``network`` may be in DeepSpeed's hands, at any ZeRO stage; ``shadow``, in fp32, starts as its equal.
    """

    def __init__(self, network: nn.Module, shadow: nn.Module, decay: float) -> None:
        self.network, self.shadow, self.decay = network, shadow, decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (the first is 1); all ranks together."""
        decay = min(self.decay, step / (9 + step))
        with _whole(self.network) as weights:
            torch._foreach_lerp_(list(self.shadow.parameters()), [w.float() for w in weights], 1 - decay)

    def save(self, path: Path) -> None:
        """Write the average: a reader sees the whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        write_tensors(self.shadow.state_dict(), fresh)
        os.replace(fresh, path)

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote."""
        self.shadow.load_state_dict(load_file(path))


@contextmanager
def _whole(network: nn.Module) -> Iterator[list[Tensor]]:
    """The parameters, put together where ZeRO 3 has them in parts."""
    parameters = list(network.parameters())
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield [p.detach() for p in parameters]
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield [p.detach() for p in parameters]
