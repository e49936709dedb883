"""Cache of constant tensors on devices, so that a step copies nothing from the host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")


class ConstantCache(Generic[T]):
    """The last ``size`` constants by key and device.

    Not module buffers: DeepSpeed would cast those to bf16 together with the weights, and round positions.
    """

    def __init__(self, size: int = 32) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, like: Tensor, build: Callable[[], T]) -> T:
        """The constant ``key`` for the device of ``like``; ``build`` makes it at the first call."""
        # A fake constant belongs to its fake mode.
        key = (key, like.device, like.fake_mode if isinstance(like, FakeTensor) else None)
        if key not in self._values:
            self._values[key] = build()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]
