"""Formulas for kernel launches and memory traffic against the operations that are dispatched."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import memory
from maestro_scale.model.cost import num_parameters
from maestro_scale.model.operations import elementwise_bytes, num_operations
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source

# Operations that launch no kernel: views, and allocations without values.
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "t",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
    ),
    *(
        "squeeze",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "detach",
        "alias",
        "as_strided",
        "unfold",
    ),
    *(
        "diagonal",
        "lift_fresh",
        "chunk",
        "narrow",
        "unflatten",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
    ),
    "new_empty_strided",
}
PRODUCTS = {"mm", "addmm", "bmm"}
MICRO_BATCH = 8


class Dispatched(TorchDispatchMode):
    """Number of operations, and bytes that those beside matrix products and attention read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in VIEWS or func._schema.name.startswith("prim"):
            return result
        self.operations[name] += 1
        if name not in PRODUCTS and "attention" not in name:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return result


@pytest.mark.parametrize(
    ("preset", "size", "checkpointing", "precision"),
    [
        ("treesatai_ts", "base", "none", "bf16"),
        ("flair_hub", "base", "blocks", "bf16"),
        ("flair_hub", "small", "none", "fp32"),
        ("treesatai_ts", "large", "none", "bf16_weights"),
    ],
)
def test_formulas_agree_with_dispatched_operations(monkeypatch, preset, size, checkpointing, precision):
    dispatched = Dispatched()

    class Counted(memory.LiveBytes):
        def __enter__(self):
            dispatched.__enter__()
            return super().__enter__()

        def __exit__(self, *error):
            super().__exit__(*error)
            return dispatched.__exit__(*error)

    monkeypatch.setattr(memory, "LiveBytes", Counted)
    spec, config, ratio = memory.preset_model(preset, size, checkpointing)
    batch = mock_batch(Source(spec=spec, shards=(), store=None), config.dataset, MICRO_BATCH)
    memory.count(config, batch, precision, ratio)
    operations = sum(dispatched.operations.values())
    assert num_operations(config, ratio, precision) == pytest.approx(operations, rel=0.1)
    moved = elementwise_bytes(config, ratio, precision, MICRO_BATCH, num_parameters(config))
    assert moved == pytest.approx(dispatched.bytes, rel=0.2)


def test_a_compiled_step_is_two_launches_and_blocks_take_fewer():
    _, config, ratio = memory.preset_model("treesatai_ts", "base")
    assert num_operations(config, ratio, "bf16", "step") == 2
    eager, blocks = (num_operations(config, ratio, "bf16", mode) for mode in ("none", "blocks"))
    assert eager - blocks == (34 - 20) * 39
