"""Examples of three lines for the simulated device, each with what it must record. Run as a script: prints JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

CASES: dict[str, Callable[[], object]] = {}
EXPECTED: dict[str, list[str]] = {}


def case(*expected: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """A case that records ``expected``: "kind operation", without kernels and copies that are not asked for."""

    def register(function: Callable[[], object]) -> Callable[[], object]:
        CASES[function.__name__], EXPECTED[function.__name__] = function, list(expected)
        return function

    return register


def host(*shape: int):
    import torch

    return torch.ones(shape)


def device(*shape: int):
    import torch

    return torch.ones(shape, device="simulated")


def pinned(*shape: int):
    import torch

    return torch.ones(shape, pin_memory=True)


# -- what is no problem ---------------------------------------------------------------------------------------------


@case()
def arithmetic_on_the_device():
    import torch

    layer = torch.nn.functional.layer_norm(device(2, 3) @ device(3, 4), (4,))
    assert layer.softmax(dim=1).sum(dim=0).topk(2).values.device.type == "simulated"


@case()
def a_host_scalar():
    import torch

    where = torch.where(device(3) > 0, device(3), torch.tensor(0.0))
    assert (where + torch.tensor(2.0)).mul_(torch.tensor(3.0)).device.type == "simulated"


@case()
def a_pinned_block_without_blocking():
    pinned(3).to("simulated", non_blocking=True)


@case()
def a_copy_into_pinned_memory_without_blocking():
    pinned(3).copy_(device(3), non_blocking=True)


@case()
def filling_by_a_mask():
    values = device(3)
    values[values > 0] = 2.0


@case()
def repeating_with_a_given_size():
    device(3).repeat_interleave(device(3).long(), output_size=3)


@case()
def views_and_factories():
    import torch

    values = torch.zeros(2, 3, device="simulated")
    values.view(3, 2)[1:].unsqueeze(0).transpose(0, 1).data.detach()
    assert torch.empty_like(values).unsqueeze_(0).shape == (1, 2, 3)


# -- mixed devices --------------------------------------------------------------------------------------------------


@case("mix aten.add.Tensor")
def adding_a_host_tensor():
    device(3) + host(3)


@case("mix aten.add.Tensor")
def adding_a_device_scalar_to_a_host_tensor():
    host(3) + device(3).sum()


@case("mix aten.add_.Tensor")
def adding_to_a_host_scalar():
    host().add_(device())


@case("mix aten.mm.default")
def multiplying_by_a_host_matrix():
    device(2, 3) @ host(3, 2)


@case("mix aten.stack.default")
def concatenating_a_host_scalar():
    import torch

    torch.stack([device(), host()])


@case("mix aten._foreach_mul.List")
def a_list_with_a_host_tensor():
    import torch

    torch._foreach_mul([device(2), device(2)], [device(2), host(2)])


@case("mix aten.index_select.default")
def selecting_by_host_indices():
    device(3).index_select(0, host(2).long())


# -- host synchronisations ------------------------------------------------------------------------------------------


@case("sync _local_scalar_dense")
def item():
    device().item()


@case("sync _local_scalar_dense")
def a_condition():
    bool(device(3).sum() > 0)


@case("sync device to host")
def a_list():
    device(3).tolist()


@case("sync device to host")
def a_copy_to_the_host():
    device(3).cpu()


@case("sync device to host")
def a_copy_to_pageable_memory_without_blocking():
    host(3).copy_(device(3), non_blocking=True)


@case("sync device to host")
def a_blocking_copy_to_pinned_memory():
    pinned(3).copy_(device(3))


@case("sync host to device")
def a_tensor_of_a_list():
    import torch

    torch.tensor([1, 2], device="simulated")


@case("sync host to device")
def a_pageable_tensor_without_blocking():
    host(3).to("simulated", non_blocking=True)


@case("sync host to device")
def a_pinned_tensor_with_blocking():
    pinned(3).to("simulated")


@case("sync nonzero")
def nonzero():
    device(3).nonzero()


@case("sync masked_select")
def masked_select():
    device(3).masked_select(device(3) > 0)


@case("sync index with a mask")
def indexing_by_a_mask():
    values = device(3)
    values[values > 0]


@case("sync index_put_ with a mask")
def writing_by_a_mask():
    values = device(3)
    values[values > 0] = device(3)


@case("sync index with host indices")
def indexing_by_host_indices():
    device(3)[host(2).long()]


@case("sync _unique2")
def unique():
    device(3).unique()


@case("sync repeat_interleave")
def repeating():
    device(3).repeat_interleave(device(3).long())


@case("sync equal")
def equal():
    device(3).equal(device(3))


@case("sync bincount")
def bincount():
    device(3).long().bincount()


@case("sync synchronize")
def synchronizing_the_device():
    import torch

    torch.get_device_module("simulated").synchronize()


@case("stream record", "sync event.synchronize", "sync stream.synchronize")
def synchronizing_an_event_and_a_stream():
    import torch

    stream = torch.Stream(device="simulated")
    stream.record_event().synchronize()
    stream.synchronize()


# -- streams --------------------------------------------------------------------------------------------------------


def copied_on_a_side_stream(wait: bool = True, keep: bool = True, block=None):
    import torch

    side, compute = torch.Stream(device="simulated"), torch.accelerator.current_stream("simulated")
    with side:
        block = (pinned(3) if block is None else block).to("simulated", non_blocking=True)
    copied = side.record_event()
    if wait:
        compute.wait_event(copied)
    if keep:
        block.record_stream(compute)
    return side, block


@case("stream record", "stream wait")
def a_copy_on_a_side_stream():
    side, block = copied_on_a_side_stream()
    block + 1
    del block
    with side:
        device(3)


@case("stream record", "stream wait", "stream record", "sync event.synchronize")
def dropping_a_tensor_after_its_copy_to_the_host_has_arrived():
    import torch

    side, compute = torch.Stream(device="simulated"), torch.accelerator.current_stream("simulated")
    values = device(3)
    side.wait_event(compute.record_event())
    with side:
        pinned(3).copy_(values, non_blocking=True)
    side.record_event().synchronize()
    del values
    with side:
        device(3)


@case("stream record", "race add")
def using_a_copy_without_waiting_for_it():
    _, block = copied_on_a_side_stream(wait=False)
    block + 1


@case("stream record", "stream wait", "race free")
def dropping_a_copy_without_record_stream():
    side, block = copied_on_a_side_stream(keep=False)
    block + 1
    del block
    with side:
        device(3)


@case("stream record", "stream wait", "race aten.fill_.Scalar")
def reusing_a_pinned_block_too_early():
    block = pinned(3)
    copied_on_a_side_stream(block=block)
    block.fill_(2)


@case("stream record", "stream wait", "sync synchronize")
def reusing_a_pinned_block_after_a_synchronisation():
    import torch

    block = pinned(3)
    copied_on_a_side_stream(block=block)
    torch.get_device_module("simulated").synchronize()
    block.fill_(2)


@case("race aten.add.Tensor")
def reading_a_copy_before_it_has_arrived():
    arriving = pinned(3).copy_(device(3), non_blocking=True)
    arriving + 1


# -- collectives ----------------------------------------------------------------------------------------------------


@case("mix allreduce_ of host tensors in a group of device tensors")
def a_collective_of_host_tensors():
    import torch

    torch.distributed.all_reduce(host(3))
    torch.distributed.all_reduce(device(3))


@case("mix allreduce_ of device tensors in a group of host tensors")
def a_collective_of_device_tensors_over_the_host():
    import torch
    from testkit.simulated.tensor import host_groups

    torch.distributed.all_reduce(host(3), group=host_groups[0])
    torch.distributed.all_reduce(device(3), group=host_groups[0])


# -- autograd and precision -----------------------------------------------------------------------------------------


@case("sync _local_scalar_dense")
def a_synchronisation_in_a_backward_pass():
    """Recorded although autograd runs it on a thread of its own, in the phase and at the line of the main program."""
    values = device(3).requires_grad_()
    values.register_hook(lambda grad: grad * grad.sum().item())
    values.sum().backward()


@case()
def autocast_computes_matrix_products_in_bf16():
    import torch

    with torch.autocast("simulated", dtype=torch.bfloat16):
        product = torch.nn.functional.linear(device(2, 3), device(4, 3))
        assert product.dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(product, (4,)).dtype == torch.float32
        assert (product + 1).dtype == torch.bfloat16


@case("sync host to device", "sync host to device")
def a_module_keeps_its_parameters_when_it_moves():
    import torch

    module = torch.nn.Linear(3, 2)
    before = list(module.parameters())
    module.to("simulated").to("simulated")
    assert all(
        a is b and b.device.type == "simulated" for a, b in zip(before, module.parameters(), strict=True)
    )
    torch.optim.AdamW(module.parameters(), fused=True)
    module(device(1, 3)).sum().backward()
    assert before[0].grad.device.type == "simulated"


@case()
def strict_raises():
    from testkit.simulated.tensor import recorder, simulation

    message = ""
    try:
        with simulation(strict=True):
            device(3) + host(3)
    except RuntimeError as error:
        message = str(error)
    assert "host tensor (3,)" in message, message
    recorder.records.clear()


def located() -> list[object]:
    """Records of functions that are compiled as if they were in files of the package and of DeepSpeed."""
    import torch
    from testkit.simulated.tensor import recorder, simulation

    recorder.records.clear()
    inner: dict[str, Callable] = {}
    exec(compile("def read(t):\n    return t.item()", "/x/site-packages/deepspeed/engine.py", "exec"), inner)
    text = "def step(t, read):\n    t.cpu()\n    return read(t) if read else t.item()"
    outer: dict[str, Callable] = {}
    exec(compile(text, "/y/maestro_scale/training/step.py", "exec"), outer)
    with simulation(), recorder.phase("forward"):
        one = torch.ones((), device="simulated")
        outer["step"](one, None)
        with recorder.phase("log"):
            outer["step"](one, inner["read"])
    return [r for r in recorder.records if r.kind == "sync"]


def main() -> None:
    import torch.distributed as dist
    from testkit.simulated.tensor import host_groups, recorder, simulation

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    host_groups.append(dist.new_group(backend="gloo"))
    found = {}
    for name, function in CASES.items():
        recorder.records.clear()
        with simulation():
            function()
        shown = [r for r in recorder.records if r.kind not in ("kernel", "copy")]
        found[name] = [f"{r.kind} {r.op}" for r in shown]
    json.dump({"cases": found, "records": [str(r) for r in located()]}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads would abort the interpreter's shutdown


if __name__ == "__main__":
    main()
