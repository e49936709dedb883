"""The simulated device's tensors and the dispatch of operations on them.

A device tensor is a subclass that shares the memory of a CPU tensor and reports another device, so that ``.data =``,
views and in-place operations, on which DeepSpeed relies, work as on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from testkit.simulated import autocast
from testkit.simulated.recorder import COPY, KERNEL, MIX, SYNC, Recorder
from testkit.simulated.rules import Operation, map_tensors, operation, tensors_of
from testkit.simulated.streams import DeviceModule

NAME = "simulated"
aten = torch.ops.aten

recorder = Recorder()
module = DeviceModule(recorder)
_setup_privateuseone_for_python_backend(NAME, module)
torch._C._set_only_lift_cpu_tensors(
    True
)  # torch.tensor(list, device=…) is a host tensor and a copy, as on a GPU
autocast.register()
DEVICE = torch.device(NAME, 0)
_module_to = torch.nn.Module.to


def _to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    # A parameter that moves to another device stays the same object, as on a GPU. By assignment to ``data``, torch's
    # way, a host tensor cannot become one of this class, so its contents are swapped.
    device, *_ = torch._C._nn._parse_to(*args, **kwargs)
    moves = device is not None and any(
        t.device.type != device.type for t in (*self.parameters(), *self.buffers())
    )
    torch.__future__.set_swap_module_params_on_conversion(moves)
    try:
        return _module_to(self, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


torch.nn.Module.to = _to
torch.nn.Module.cpu = lambda self: _to(self, "cpu")
torch.Stream = lambda device=None, **options: module.Stream()
torch.accelerator.current_stream = module.current_stream
torch.accelerator.set_stream = module.set_stream
torch.accelerator.synchronize = module.synchronize
host_groups: list[
    Any
] = []  # process groups of host tensors; all others are those of the device, as with NCCL

_METADATA = {"is_pinned", "_pin_memory", "pin_memory", "_fused_sdp_choice"}
_HOST = torch.device("cpu")


class SimulatedTensor(Tensor):
    """A tensor of the device ``simulated:0``, with CPU memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> SimulatedTensor:
        return Tensor._make_subclass(cls, host, False, dispatch_device=True, device_for_backend_keys=DEVICE)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return DEVICE
        return _dispatch(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: int) -> Any:
        return _restore, (self.detach().cpu(), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                made = torch.nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        module.timeline.record_stream(self, stream.stream_id)

    def is_pinned(self, device: Any = None) -> bool:
        return False


def _restore(host: Tensor, requires_grad: bool) -> Tensor:
    return host.to(DEVICE).requires_grad_(requires_grad)


class _Pinned:
    """Page-locked host memory, by address, as CUDA knows it: also views made by way of numpy are page-locked."""

    def __init__(self) -> None:
        self._storages: list[tuple[int, int, StorageWeakRef]] = []

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages = [s for s in self._storages if not s[2].expired()]
        self._storages.append((storage.data_ptr(), storage.nbytes(), StorageWeakRef(storage)))

    def __len__(self) -> int:
        return len(self._storages)

    def __contains__(self, tensor: Tensor) -> bool:
        at = tensor.untyped_storage().data_ptr()
        return any(first <= at < first + size and not ref.expired() for first, size, ref in self._storages)


pinned = _Pinned()


class _Simulation(TorchDispatchMode):
    """Sees the operations that have no device tensor among their arguments: copies to the device and factories."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return DEVICE
        return _dispatch(func, args, kwargs or {})


@contextmanager
def simulation(strict: bool = False) -> Iterator[Recorder]:
    """Make the device usable on this thread, and record."""
    before, recorder.strict = recorder.strict, strict
    try:
        with _Simulation():
            yield recorder
    finally:
        recorder.strict = before


def plain(tensor: Tensor) -> Tensor:
    """The memory of a device tensor as a host tensor. Nothing is recorded: for what is not simulated."""
    made = torch.empty(0, dtype=tensor.dtype)
    return made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    op = operation(func)
    used = op.uses(args, kwargs)
    on_device = any(isinstance(t, SimulatedTensor) for t, _ in used)
    asked = kwargs.get("device")
    to_device = on_device if asked is None else torch.device(asked).type == NAME
    if op.namespace == "c10d":
        _check_collective(op.name, args, [t for t, _ in used])
    elif op.name in _METADATA:
        return _metadata(op.name, args)
    if not on_device and not to_device:
        return _host(op, func, args, kwargs, used)
    if op.name in ("_to_copy", "copy_"):
        source, target = (args[0], None) if op.name == "_to_copy" else (args[1], args[0])
        arrives = to_device if target is None else isinstance(target, SimulatedTensor)
        if arrives != isinstance(source, SimulatedTensor):
            return _copy(func, args, kwargs, source, target)
    _check(op, func, args, kwargs, used)
    return _kernel(op, func, args, kwargs, used, to_device)


def _host(
    op: Operation, func: Any, args: Any, kwargs: dict[str, Any], used: list[tuple[Tensor, bool]]
) -> Any:
    """An operation on host tensors only."""
    if op.launches and pinned:
        for tensor, writes in used:
            if tensor in pinned:
                module.timeline.host_uses(str(func), tensor, writes)
    if not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    out = func(*args, **{**kwargs, "pin_memory": False})
    pinned.add(out)
    return out


def _metadata(name: str, args: Any) -> Any:
    if name == "is_pinned":
        return not isinstance(args[0], SimulatedTensor) and args[0] in pinned
    if name == "_fused_sdp_choice":
        return 0  # the kernel of plain matrix products: it has no CPU-only operations
    if args[0] in pinned:
        return args[0]
    out = args[0].clone()
    pinned.add(out)
    return out


def _copy(func: Any, args: Any, kwargs: dict[str, Any], source: Tensor, target: Tensor | None) -> Any:
    """A copy between host and device, on the current stream."""
    to_device = not isinstance(source, SimulatedTensor)
    non_blocking = bool(
        kwargs.get("non_blocking") or (args[2] if len(args) > 2 and target is not None else False)
    )
    out = target
    if out is None:
        options = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        made = func(plain(source) if not to_device else source, **{**options, "device": _HOST})
        if to_device:
            out = SimulatedTensor(made)
        else:
            out = made
            if non_blocking:  # as at::_to_copy does
                pinned.add(out)
    host = source if to_device else out
    is_pinned = host in pinned
    number = module.current_stream().stream_id
    name = "host to device" if to_device else "device to host"
    detail = f"{tuple(source.shape)} {source.dtype} {'pinned' if is_pinned else 'pageable'}"
    recorder.add(COPY, name, number, detail)
    reads = [source] if not to_device or is_pinned else []
    writes = [out] if to_device or is_pinned else []
    module.timeline.run(name, number, reads, writes)
    if target is not None:
        with torch.no_grad():
            _plain_of(target).copy_(_plain_of(source))
    if not (non_blocking and is_pinned):
        # Also a non-blocking copy of pageable memory waits: the driver has to read all of it before it returns.
        recorder.add(SYNC, name, number, detail)
        module.timeline.wait_host(number)
    return out


def _plain_of(tensor: Tensor) -> Tensor:
    return plain(tensor) if isinstance(tensor, SimulatedTensor) else tensor


def _check(
    op: Operation, func: Any, args: Any, kwargs: dict[str, Any], used: list[tuple[Tensor, bool]]
) -> None:
    """Record mixed devices and synchronisations of an operation."""
    if op.namespace == "c10d":
        return  # see _check_collective
    number = module.current_stream().stream_id
    for tensor, writes in used:
        if isinstance(tensor, SimulatedTensor):
            continue
        if op.indexes and any(tensor is i for i in tensors_of(args[1])):
            recorder.add(SYNC, f"{op.name} with host indices", number)
        elif tensor.dim() or writes or not op.takes_scalars:
            recorder.add(MIX, str(func), number, f"host tensor {tuple(tensor.shape)} {tensor.dtype}")
    if op.synchronises(args, kwargs):
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t, _ in used)
        recorder.add(SYNC, f"{op.name} with a mask" if op.indexes else op.name, number, shapes)


def _check_collective(name: str, args: Any, inputs: list[Tensor]) -> None:
    """A device's collectives cannot send host memory, and the host's would first have to wait for the device."""
    groups = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
    on_host = any(torch.distributed.ProcessGroup.unbox(g) in host_groups for g in groups)
    number = module.current_stream().stream_id
    if name == "barrier":
        if not on_host:
            recorder.add(SYNC, "barrier", number)
    elif on_host and any(isinstance(t, SimulatedTensor) for t in inputs):
        recorder.add(MIX, f"{name} of device tensors in a group of host tensors", number)
    elif not on_host and not all(isinstance(t, SimulatedTensor) for t in inputs):
        recorder.add(MIX, f"{name} of host tensors in a group of device tensors", number)


def _kernel(
    op: Operation,
    func: Any,
    args: Any,
    kwargs: dict[str, Any],
    used: list[tuple[Tensor, bool]],
    to_device: bool,
) -> Any:
    """Run an operation on the memory of the device."""
    number = module.current_stream().stream_id
    options = {key: map_tensors(value, _plain_of) for key, value in kwargs.items()}
    if options.get("device") is not None:
        options["device"] = _HOST
    back: dict[int, Tensor] = {}  # an operation in place returns its argument

    def convert(tensor: Tensor) -> Tensor:
        made = _plain_of(tensor)
        back[id(made)] = tensor
        return made

    out = func(*[map_tensors(a, convert) for a in args], **options)
    if op.changes_metadata:
        # That of the plain alias has changed: give it to the tensor itself.
        args[0].data = SimulatedTensor(out)
        return args[0]
    made: list[Tensor] = []

    def wrap(tensor: Tensor) -> Tensor:
        if (known := back.get(id(tensor))) is not None:
            return known
        if not to_device:
            return tensor
        made.append(SimulatedTensor(tensor))
        return made[-1]

    out = map_tensors(out, wrap)
    if op.launches:
        recorder.add(KERNEL, op.name, number)
        on_device = [(t, writes) for t, writes in used if isinstance(t, SimulatedTensor)]
        reads = [t for t, writes in on_device if not writes]
        writes = [t for t, writes in on_device if writes] + made
        module.timeline.run(op.name, number, reads, writes)
        if op.data_dependent:
            module.timeline.wait_host(number)
    return out
