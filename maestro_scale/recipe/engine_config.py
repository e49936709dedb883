"""The ``deepspeed:`` section: checks it against the rest of the recipe and fills in the derived values.

Verified against DeepSpeed 0.19.8 (runtime/config.py, runtime/engine.py). Defaults that changed between its
releases, or that the training loop relies on, are set explicitly.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_STAGE = 2

# The training loop scales the loss for this reduction and steps at this boundary: other values give wrong gradients.
_PINNED = {
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
}

FROM_MICRO_BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

_REFUSED = {
    "elasticity": "DeepSpeed 0.19 removed it; data.lanes lets a run resume on another number of ranks",
    "amp": "DeepSpeed 0.19 removed it; use train.precision",
    "optimizer": "the optimizer is AdamW with the values of the recipe's optim section; leave it out",
    "tensor_parallel": "ranks share the batch, not the layers: leave it out, and use a higher ZeRO stage for memory",
    "scheduler": "the schedule is the recipe's optim.schedule; leave it out",
}
_ZERO_REFUSED = {
    "mics_shard_size": "DeepSpeed 0.19 removed MiCS; use zero_hpz_partition_size",
    "mics_hierarchical_params_gather": "DeepSpeed 0.19 removed MiCS; use zero_hpz_partition_size",
}
_FP32_STATE = "master weights and AdamW's moments are fp32: leave it out"
_OWN_STEP = "DeepSpeed would replace the optimizer step, which the guard decides on: leave it out"
# Refused where they are set to anything but false: DeepSpeed's parser accepts them.
_REFUSED_IF_ON = {
    ("bf16", "bf16_master_weights_and_grads"): _FP32_STATE,
    ("bf16", "bf16_optimizer_states"): _FP32_STATE,
    ("fp16", "fp16_master_weights_and_grads"): _FP32_STATE,
    ("zero_force_ds_cpu_optimizer",): "the optimizer is torch's AdamW under offload too: leave it out",
    ("zero_optimization", "offload_optimizer", "super_offload"): _OWN_STEP,
    ("zero_optimization", "zenflow"): _OWN_STEP,
}
_OFFLOAD_FROM = {"offload_optimizer": 1, "offload_param": 3}  # the first ZeRO stage that does it
_MAPPINGS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "checkpoint", "timers")
# DeepSpeed ignores unknown top-level keys, so that a misspelt one would have no effect and no message.
_KNOWN = (
    "activation_checkpointing",
    "aio",
    "autotuning",
    "bf16",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_efficiency",
    "data_types",
    "dataloader_drop_last",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
_STAGE = ("zero", "stage", "zero_stage")  # what the stage is called elsewhere


@dataclass(frozen=True)
class Derived:
    """Values that follow from the rest of the recipe. None: not known yet, so neither filled in nor checked.

    ``micro_batch`` is None while ``train.micro_batch`` is auto.
    """

    global_batch: int
    micro_batch: int | None
    clip: float
    world_size: int | None = None
    precision: str | None = None  # "bf16", "bf16_weights" or "fp32"

    @property
    def num_micro_batches(self) -> int | None:
        """Micro-batches of a rank per optimizer step, which DeepSpeed calls gradient accumulation steps."""
        if self.world_size is None or self.micro_batch is None:
            return None
        return self.global_batch // (self.micro_batch * self.world_size)


def stage_of(section: Mapping[str, Any]) -> int:
    """The ZeRO stage of a ``deepspeed:`` section (default 2)."""
    return section.get("zero_optimization", {}).get("stage", DEFAULT_STAGE)


def problems(section: Mapping[str, Any], derived: Derived) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key path within the section, reason) of every setting that DeepSpeed or the training loop cannot use."""
    flat = [key for key in _MAPPINGS if not isinstance(section.get(key, {}), dict)]
    if flat:
        yield from (((key,), f"must be a mapping of keys to values, got {section[key]!r}") for key in flat)
        return
    zero = section.get("zero_optimization", {})
    for key, reason in _REFUSED.items():
        if key in section:
            yield (key,), f"refused: {reason}"
    for key, reason in _ZERO_REFUSED.items():
        if key in zero:
            yield ("zero_optimization", key), f"refused: {reason}"
    for path, reason in _REFUSED_IF_ON.items():
        if _get(section, path) not in (None, False):
            yield path, f"refused: {reason}"
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            yield ("zero_optimization", part, "device"), "'nvme' cannot be checkpointed: use 'cpu'"
        if isinstance(offload, dict) and offload.get("ratio", 1.0) != 1.0:
            yield (
                ("zero_optimization", part, "ratio"),
                "a part of the optimizer cannot be offloaded: leave it out",
            )
    for key in section:
        close = difflib.get_close_matches(str(key), _KNOWN, n=1, cutoff=0.85)
        if close and key not in _KNOWN and key not in _REFUSED:
            yield (key,), f"DeepSpeed would ignore this key (did you mean {close[0]!r}?)"
        elif key in _STAGE:
            yield (key,), "DeepSpeed would ignore this key (did you mean 'zero_optimization.stage'?)"
    stage = zero.get("stage", DEFAULT_STAGE)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield ("zero_optimization", "stage"), f"must be 0, 1, 2 or 3, got {stage!r}"
        return
    for part, first in _OFFLOAD_FROM.items():
        offload = zero.get(part)
        if isinstance(offload, dict) and offload.get("device", "none") != "none" and stage < first:
            yield (
                ("zero_optimization", part),
                f"ZeRO stage {stage} ignores it: use stage {first}{' or higher' * (first < 3)}, or leave it out",
            )
    if derived.precision == "bf16_weights" and stage == 0:
        yield (
            ("zero_optimization", "stage"),
            "train.precision bf16_weights needs ZeRO stage 1, 2 or 3, which keep the fp32 master weights: set one, or "
            "train.precision=bf16",
        )
    if derived.micro_batch is None:
        for key in FROM_MICRO_BATCH:
            if section.get(key) not in (None, "auto"):
                yield (key,), "follows from train.micro_batch, which is auto: leave it out"
    for path, value, source in _derived_settings(section, derived):
        given = _get(section, path)
        if given not in (None, "auto", value):
            yield path, f"{given!r} contradicts {value!r}, which follows from {source}: leave it out"


def complete_config(section: Mapping[str, Any], derived: Derived) -> dict[str, Any]:
    """A complete DeepSpeed config: ``section``, the derived values, and the defaults that training relies on."""
    config = copy.deepcopy(dict(section))
    for key in FROM_MICRO_BATCH:
        if (
            config.get(key) == "auto"
        ):  # while it is not known, DeepSpeed's parser would calculate with the text
            del config[key]
    for path, value, _ in _derived_settings(section, derived):
        _put(config, path, value, over=True)
    for path, value in _default_settings(config):
        _put(config, path, value, over=False)
    return config


def _derived_settings(section: Mapping[str, Any], d: Derived) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    yield ("train_batch_size",), d.global_batch, f"train.global_batch {d.global_batch}"
    if d.micro_batch is not None:
        yield ("train_micro_batch_size_per_gpu",), d.micro_batch, f"train.micro_batch {d.micro_batch}"
    yield ("gradient_clipping",), d.clip, f"optim.clip {d.clip}"
    if d.num_micro_batches is not None:
        source = f"train.global_batch {d.global_batch} on {d.world_size} ranks of micro_batch {d.micro_batch}"
        yield ("gradient_accumulation_steps",), d.num_micro_batches, source
    yield ("fp16", "enabled"), False, "train.precision, which has no fp16"
    for key, value in _PINNED.items():
        yield (key,), value, "the training loop, which is written for it"
    if d.precision is not None:
        yield from _precision_settings(d.precision)


def _precision_settings(precision: str) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """DeepSpeed's two kinds of bf16, of which at most one is enabled.

    ``bf16.enabled`` is refused at ZeRO stage 0 (see ``problems``): there DeepSpeed's bf16 optimizer begins with a
    dummy Adam step (issue #5104).
    """
    why = f"train.precision {precision}"
    if precision == "bf16":
        why += ", fp32 weights under torch_autocast (bf16_weights: bf16.enabled)"
    yield ("bf16", "enabled"), precision == "bf16_weights", why
    yield ("torch_autocast", "enabled"), precision == "bf16", why
    if precision == "bf16":
        yield ("torch_autocast", "dtype"), "bfloat16", why


def _default_settings(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    low = bool(_get(config, ("bf16", "enabled")))
    # The guard checks the norm instead, on the device: DeepSpeed's check takes 8 operations per tensor and a read.
    yield ("bf16", "check_grad_overflow"), False
    yield ("bf16", "immediate_grad_update"), False
    if _get(config, ("torch_autocast", "enabled")):
        # DeepSpeed would send the gradients of these modules in bf16, and in stage 3 gather their weights in bf16. With
        # none, all gradients are summed over ranks in fp32 (docs/model.md compares both).
        yield ("torch_autocast", "lower_precision_safe_modules"), []
    yield (
        ("data_types", "grad_accum_dtype"),
        "fp32",
    )  # the loss curve must not depend on the number of micro-batches
    yield ("communication_data_type",), "bf16" if low else "fp32"
    yield ("seq_parallel_communication_data_type",), "fp32"
    yield ("steps_per_print",), 10**9  # the training loop prints the progress
    yield ("wall_clock_breakdown",), False
    # On by default; it waits for the device before and after every micro-batch.
    yield ("timers", "throughput", "enabled"), False
    yield ("dump_state",), False
    yield ("zero_allow_untested_optimizer",), False
    yield ("zero_force_ds_cpu_optimizer",), False  # torch's AdamW is used under offload too
    yield (
        ("checkpoint", "tag_validation"),
        "Fail",
    )  # ranks with different tags would each write a part of another checkpoint
    yield ("checkpoint", "load_universal"), False
    zero = "zero_optimization"
    yield (zero, "stage"), DEFAULT_STAGE
    yield (zero, "contiguous_gradients"), True
    yield (zero, "reduce_scatter"), True
    yield (zero, "allgather_partitions"), True
    yield (zero, "round_robin_gradients"), False
    yield (zero, "overlap_comm"), stage_of(config) == 3
    yield (zero, "ignore_unused_parameters"), True
    if stage_of(config) == 3 and _get(config, ("torch_autocast", "enabled")):
        # DeepSpeed's own linear function rounds to bf16 once more, before it adds the bias, which moves the loss by
        # 0.1 % in the warm-up (benchmarks/precision.py). It saves no memory here: autograd keeps the bf16 casts of the
        # weights, not the gathered weights.
        yield (zero, "memory_efficient_linear"), False
    if stage_of(config) == 3 and "gather_16bit_weights_on_model_save" not in config[zero]:
        yield (
            (zero, "stage3_gather_16bit_weights_on_model_save"),
            True,
        )  # without it saving returns False without an error


def _get(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _put(config: dict[str, Any], path: tuple[str, ...], value: Any, *, over: bool) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    if over or config.get(path[-1]) is None:
        config[path[-1]] = value
