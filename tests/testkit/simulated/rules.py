"""Properties of torch's operations: what they read and write, and which of them wait for the device on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Their result has a shape or a value that the host needs.
_DATA_DEPENDENT = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}
# Operations without a pointwise tag that take host scalars as CUDA's pointwise kernels do.
_SCALARS = ("where", "fill", "masked_fill", "_foreach_", "lerp", "_fused_adamw", "_fused_adam", "index_put")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_NO_KERNEL = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
}


@dataclass(frozen=True)
class Operation:
    """``arguments``: (name, whether it is written). ``launches``: whether it runs a kernel, which a view does not."""

    namespace: str
    name: str
    arguments: tuple[tuple[str, bool], ...]
    launches: bool
    changes_metadata: bool
    takes_scalars: bool
    data_dependent: bool
    indexes: bool

    def uses(self, args: Any, kwargs: dict[str, Any]) -> list[tuple[Tensor, bool]]:
        """(tensor, whether it is written) of all arguments."""
        found = []
        for i, (name, writes) in enumerate(self.arguments):
            value = args[i] if i < len(args) else kwargs.get(name)
            if isinstance(value, Tensor):
                found.append((value, writes))
            elif isinstance(value, (list, tuple)):
                found += [(tensor, writes) for tensor in tensors_of(value)]
        return found

    def synchronises(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the host waits for the device, with device tensors as ``args``."""
        if self.name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if self.indexes and any(i.dtype in (torch.bool, torch.uint8) for i in tensors_of(args[1])):
            return not _is_masked_fill(self.name, args)
        return self.data_dependent


@functools.cache
def operation(func: Any) -> Operation:
    """The properties of an OpOverload."""
    schema = func._schema
    namespace, _, name = schema.name.partition("::")
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    views = bool(aliases) and not any(a.is_write for a in aliases)
    changes_metadata = torch.Tag.inplace_view in func.tags or name in ("set_", "resize_")
    return Operation(
        namespace=namespace,
        name=name,
        arguments=tuple(
            (a.name, a.alias_info is not None and a.alias_info.is_write) for a in schema.arguments
        ),
        launches=not (views or changes_metadata or name in _NO_KERNEL),
        changes_metadata=changes_metadata,
        takes_scalars=torch.Tag.pointwise in func.tags or name.startswith(_SCALARS),
        data_dependent=name in _DATA_DEPENDENT,
        indexes=name in _INDEXING,
    )


def _is_masked_fill(name: str, args: Any) -> bool:
    """``tensor[mask] = number``, which torch computes by masked_fill."""
    if "put" not in name or len(tensors_of(args[1])) != 1:
        return False
    return args[2].numel() == 1 and not (len(args) > 3 and args[3])


def map_tensors(value: Any, convert: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``convert`` applied to all tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        return convert(value)
    if type(value) in (list, tuple):
        return type(value)([map_tensors(item, convert) for item in value])
    return value


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in nested lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_of(value)
    return found
