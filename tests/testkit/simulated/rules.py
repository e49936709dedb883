"""Properties of torch's operations: what they read and write, and which of them wait for the device on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Their result has a shape that depends on values.
DATA_DEPENDENT = {
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
SCALARS = ("where", "fill", "masked_fill", "_foreach_", "lerp", "_fused_adamw", "_fused_adam", "index_put")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


NO_KERNEL = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::detach",
    "aten::alias",
    "aten::lift_fresh",
    "aten::_reshape_alias",
    "aten::_unsafe_view",
    "aten::set_",
    "aten::resize_",
}


def map_tensors(value: Any, convert: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, (list, tuple)) and value and not isinstance(value, torch.Size):
        return type(value)([map_tensors(item, convert) for item in value])
    return value


def tensors_of(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(values, found.append)
    return found


def uses(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """(tensor, whether it is written) of all arguments. A view uses nothing."""
    schema = func._schema
    if is_view(func):
        return
    for i, argument in enumerate(schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_of(value):
            yield tensor, writes


def is_view(func: Any) -> bool:
    """Whether the operation only makes a view: no kernel is launched."""
    schema = func._schema
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    views = bool(aliases) and not any(a.is_write for a in aliases)
    return views or torch.Tag.inplace_view in func.tags or schema.name in NO_KERNEL


def is_masked_fill(name: str, args: Any, indices: list[Tensor]) -> bool:
    """``tensor[mask] = number``, which torch computes by masked_fill."""
    if "put" not in name or len(indices) != 1:
        return False
    return args[2].numel() == 1 and not (len(args) > 3 and args[3])
