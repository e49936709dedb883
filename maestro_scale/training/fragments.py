"""The sharded state of a rank, fp32 master weights and AdamW moments, as slices of named parameters.

DeepSpeed keeps flat fp32 buffers whose partition depends on the ZeRO stage and the number of ranks. Slices of named,
flattened parameters do not, so a checkpoint of one layout can be loaded by any other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maestro_scale.training.distributed import World

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``start + numel`` of the flattened parameter ``name``, in this rank's memory.

    ``weights``: (numel,) fp32, a view of the master weights. ``owned``: (offset, length) of the part that this rank
    writes to checkpoints; every element of a parameter is owned by exactly one rank. ``flat``, ``offset``: the tensor
    that AdamW updates, and where the fragment begins in it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weights: Tensor
    owned: tuple[int, int]
    flat: Tensor
    offset: int

    def view(self, buffer: Tensor) -> Tensor:
        """The fragment's part (numel,) of a moment that AdamW keeps for the whole flat tensor."""
        return buffer.view(-1).narrow(0, self.offset, self.weights.numel())


class ShardedState:
    """The fragments of one DeepSpeed engine."""

    def __init__(self, raw: Any, rank: int, world: int) -> None:
        self._raw, self._adam = raw, raw.basic_optimizer
        if hasattr(raw.optimizer, "fp32_partitioned_groups_flat"):
            self.fragments = _of_stage_3(raw)
        elif raw.optimizer is raw.basic_optimizer:
            self.fragments = _replicated(raw, rank, world)
        else:
            self.fragments = _of_stages_1_and_2(raw)

    @property
    def adam_step(self) -> int:
        """Number of updates that AdamW has made; 0 before its moments exist."""
        counters = {id(f.flat): s["step"] for f in self.fragments if (s := self._adam.state.get(f.flat))}
        # One read: the fused kernel keeps the counters on the device.
        steps = {int(s) for s in torch.stack(list(counters.values())).tolist()} if counters else set[int]()
        if len(steps) > 1:
            raise RuntimeError(f"AdamW's groups are not at the same step: {sorted(steps)}")
        return steps.pop() if steps else 0

    def moment(self, fragment: Fragment, key: str) -> Tensor:
        """One of MOMENTS for a fragment; (numel,), a view."""
        return fragment.view(self._adam.state[fragment.flat][key])

    def begin_adam_at(self, step: int) -> None:
        """Allocate AdamW's state as after ``step`` updates; moments that did not exist are zero."""
        groups = {id(p): g for g in self._adam.param_groups for p in g["params"]}
        for fragment in self.fragments:
            state = self._adam.state[fragment.flat]
            if not state:
                # Where torch's AdamW places the step counter: on the device for the fused kernel only.
                group = groups.get(id(fragment.flat), self._adam.defaults)
                device = fragment.flat.device if group.get("fused") or group.get("capturable") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for key in MOMENTS:
                    state[key] = torch.zeros_like(fragment.flat, requires_grad=False)
            state["step"].fill_(float(step))

    def gather_into(self, module: nn.Module, world: World, names: Collection[str]) -> None:
        """Copy the fp32 master weights of the parameters ``names`` into ``module``; see :func:`gather_into`."""
        weights = [f.weights.narrow(0, *f.owned) for f in self.fragments]
        gather_into(module, world, self.fragments, weights, names)

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """Copy the master weights into the weights of the forward pass; a collective."""
        zero = self._raw.optimizer
        if zero is self._raw.basic_optimizer:
            return
        if not hasattr(zero, "fp32_partitioned_groups_flat"):
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for i in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()


@torch.no_grad()
def gather_into(
    module: nn.Module,
    world: World,
    fragments: Sequence[Fragment],
    owned: Sequence[Tensor],
    names: Collection[str],
) -> None:
    """Put whole parameters together from what each rank owns of them, in a module outside of DeepSpeed; a collective.

    ``owned``: per fragment its owned elements. One parameter at a time, so that no rank holds a second whole copy.
    Every element is owned by one rank and zero on the others, so the sum over ranks is exact.
    """
    mine = {f.name: (f, values) for f, values in zip(fragments, owned, strict=True)}
    for name, parameter in module.named_parameters():
        if name not in names:
            continue
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if name in mine:
            fragment, values = mine[name]
            first, numel = fragment.owned
            whole.narrow(0, fragment.start + first, numel).copy_(values)
        if world.size > 1:
            whole = world.sum(whole)
        parameter.copy_(whole.view_as(parameter))


def _replicated(raw: Any, rank: int, world: int) -> list[Fragment]:
    found = []
    for name, p in raw.module.named_parameters():
        first, end = (p.numel() * r // world for r in (rank, rank + 1))
        found.append(
            Fragment(name, tuple(p.shape), 0, p.detach().view(-1), (first, end - first), flat=p, offset=0)
        )
    return found


def _of_stages_1_and_2(raw: Any) -> list[Fragment]:
    zero = raw.optimizer
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
    found = []
    for name, p in raw.module.named_parameters():
        if (mapping := p._hp_mapping) is None:
            continue
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = flats[mapping.param_group_index]
        weights = flat.detach().narrow(0, here.start, here.numel)
        found.append(Fragment(name, tuple(p.shape), there.start, weights, (0, here.numel), flat, here.start))
    return found


def _of_stage_3(raw: Any) -> list[Fragment]:
    zero = raw.optimizer
    found = []
    for name, p in raw.module.named_parameters():
        group, offset, held = zero.grad_position[zero.get_param_id(p)]
        start = held * zero._get_param_partition_rank(p)
        numel = min(held, math.prod(p.ds_shape) - start)  # the last ranks' parts are padded
        if numel > 0:
            flat = zero.fp32_partitioned_groups_flat[group]
            weights = flat.detach().narrow(0, offset, numel)
            found.append(Fragment(name, tuple(p.ds_shape), start, weights, (0, numel), flat, offset))
    return found
